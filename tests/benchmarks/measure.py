"""What is measured of one turn, and how turns become medians and ratios: no model, no process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(slots=True)
class Turn:
    """One turn of a contestant.

    Attributes:
        seconds: The whole of it.
        first_s: Until the first record was saved, or in the caller's hands; None if there is no such moment.
        padding: Padded tokens that carried nothing, over those that did; None if not known.
        batches: Batches it took; None if not known.
        token_limit: The limit of a batch at its end; None if there is none.
        peak_bytes: Most resident memory in it above the loaded model; None where the system cannot tell.
    """

    seconds: float
    first_s: float | None = None
    padding: float | None = None
    batches: int | None = None
    token_limit: int | None = None
    peak_bytes: int | None = None


class Stopwatch:
    """Times a turn and its memory.

    Args:
        loaded_bytes: Resident memory of this process when its model was loaded and nothing had run.

    Attributes:
        seconds: What the block of `running` took.
        peak_bytes: Most resident memory in it above `loaded_bytes`; None where the system cannot tell.
    """

    def __init__(self, loaded_bytes: int) -> None:
        self.seconds = 0.0
        self.peak_bytes: int | None = None
        self._loaded_bytes = loaded_bytes
        self._started = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the block."""
        gc.collect()
        can_peak = _forget_peak()
        self._started = time.perf_counter()
        yield
        self.seconds = self.so_far()
        if can_peak and (peak := _peak_bytes()) is not None:
            self.peak_bytes = max(0, peak - self._loaded_bytes)

    def so_far(self) -> float:
        """Seconds since the block began."""
        return time.perf_counter() - self._started


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _forget_peak() -> bool:
    """Let the kernel's peak of this process start anew (Linux); False if it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int | None:
    """The kernel's peak of this process since it was forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def interleaved(names: Sequence[str], n_rounds: int) -> Iterator[str]:
    """Names in the order of their turns: A B C A B C …, so that what slows the machine for a while slows all."""
    for _ in range(n_rounds):
        yield from names


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times the seconds of `faster` are in those of `slower`: the median over rounds of each round's ratio.

    Turns of one round are close in time, so a machine that is slow for some rounds does not show in it.
    """
    return statistics.median(one / other for one, other in zip(slower, faster, strict=True))


def digest(turns: Mapping[str, Sequence[Turn]], n_texts: int, n_tokens: int) -> list[dict[str, Any]]:
    """A row of figures for each contestant, from its turns in rounds.

    Args:
        turns: By name, as many for each.
        n_texts: Texts of the corpus.
        n_tokens: Its tokens as the model takes them, without special tokens.
    """
    rows = []
    encode = turns.get("encode")
    for name, own in turns.items():
        seconds = [turn.seconds for turn in own]
        bare = turns.get(name.replace("asyncembed", "bare loop")) if name.startswith("asyncembed") else None
        row = {
            "name": name,
            **speed(seconds, n_texts, n_tokens),
            "padding": own[-1].padding,
            "batches": own[-1].batches,
            "token_limit": own[-1].token_limit,
            "times_encode": _times(encode, seconds),
            "part_of_bare_loop": _times(bare, seconds),
            "peak_bytes": max(peaks) if (peaks := _known(turn.peak_bytes for turn in own)) else None,
            "first_s": statistics.median(firsts) if (firsts := _known(turn.first_s for turn in own)) else None,
        }
        rows.append(row)
    return rows


def speed(seconds: Sequence[float], n_texts: int, n_tokens: int) -> dict[str, Any]:
    """Median, spread, and what was done a second."""
    median = statistics.median(seconds)
    return {
        "texts_per_second": n_texts / median,
        "tokens_per_second": n_tokens / median,
        "median_s": median,
        "seconds": list(seconds),
    }


def _times(other: Sequence[Turn] | None, seconds: Sequence[float]) -> float | None:
    """The speed as a multiple of another contestant's."""
    return None if other is None else median_ratio([turn.seconds for turn in other], seconds)


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]
