"""`bin/soak`: parse, let the storms rage, tell what was counted."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from tests.soak.figures import Figures, table


@click.command(context_settings={"max_content_width": 100, "show_default": True})
@click.option("--kills", type=click.IntRange(min=1), metavar="N", help="Kill a job N times at random instants.")
@click.option("--oom", is_flag=True, help="Run jobs at several limits of memory.")
@click.option("--fuzz", type=click.IntRange(min=1), metavar="N", help="Feed N damaged inputs to readers and store.")
@click.option("--cancel", is_flag=True, help="Cancel jobs at each of their steps.")
@click.option("--server", type=click.FloatRange(min=3), metavar="MINUTES", help="Load a server and watch its memory.")
@click.option("--seed", type=int, default=0, help="Of all that is random.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("soak-results"),
    help="Folder of results.json.",
)
def main(
    kills: int | None, oom: bool, fuzz: int | None, cancel: bool, server: float | None, seed: int, out: Path
) -> None:
    """Hold the promises of reliability against storms. Exit code 1 if one was broken."""
    if not (kills or oom or fuzz or cancel or server):
        raise click.UsageError("name a storm: --kills N, --oom, --fuzz N, --cancel, --server MINUTES")
    out.mkdir(parents=True, exist_ok=True)
    results: list[Figures] = []
    with tempfile.TemporaryDirectory(dir=out, prefix="work-") as work:
        for figures in _storms(kills, oom, fuzz, cancel, server, seed, Path(work).resolve()):
            results.append(figures)
            (out / "results.json").write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    click.echo(table(results))
    sys.exit(any(one.broken for one in results))


def _storms(
    kills: int | None, oom: bool, fuzz: int | None, cancel: bool, server: float | None, seed: int, work: Path
) -> Iterator[Figures]:
    """Each storm in turn; a storm's module is only imported where it is asked for."""
    if kills:
        from tests.soak import kills as killing

        yield from killing.storm(kills, seed, work / "kills")
    if oom:
        from tests.soak import memory

        yield from memory.storm(seed, work / "oom")
    if fuzz:
        from tests.soak import fuzz as fuzzing

        yield from fuzzing.storm(fuzz, seed, work / "fuzz")
    if cancel:
        from tests.soak import cancellation

        yield from cancellation.storm(work / "cancel")
    if server:
        from tests.soak import server as serving

        yield from serving.storm(server, seed, work / "server")


if __name__ == "__main__":
    main()
