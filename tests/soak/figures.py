"""What a storm gives back, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one storm.

    Attributes:
        storm: What was done, in a few words.
        figures: What was counted.
        broken: Each promise that did not hold, with the facts; empty if all held.
    """

    storm: str
    figures: Mapping[str, int | float | str]
    broken: tuple[str, ...] = ()


def table(storms: Iterable[Figures]) -> str:
    """A Markdown table, one storm a row."""
    lines = ["| storm | figures | promises |", "| --- | --- | --- |"]
    for one in storms:
        told = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in one.figures.items()
        )
        lines.append(
            f"| {one.storm} | {told} | {'all held' if not one.broken else '**broken**: ' + '; '.join(one.broken)} |"
        )
    return "\n".join(lines)
