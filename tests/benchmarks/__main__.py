"""`bin/bench`: parse, measure, report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from asyncembed.options import DEFAULT_MODEL
from tests.benchmarks import app, app_contestants, chart, comparison, corpora, processes, report
from tests.benchmarks.contestants import Plan
from tests.benchmarks.workers import Workers

AnyPlan = TypeVar("AnyPlan", bound=Plan)


@click.command(context_settings={"max_content_width": 100, "show_default": True})
@click.option("--compare", is_flag=True, help="Whole jobs beside encode: what happens if none of these five is named.")
@click.option("--sweep", is_flag=True, help="The whole job at fixed token limits.")
@click.option("--startup", is_flag=True, help="Seconds from typing a command to its first result.")
@click.option("--resume", is_flag=True, help="Texts a second over a folder where all is done.")
@click.option("--app", is_flag=True, help="Many clients at once, in process and over HTTP, and requests beside a job.")
@click.option(
    "--corpus", type=click.Choice([*corpora.CORPORA, "both"]), default="both", help="Docstrings, their first lines."
)
@click.option("--texts", type=click.IntRange(min=1), default=5000, help="Texts of a corpus.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Turns of each contestant, after one that warms up.  [default: 5; 2 for --app]",
    show_default=False,
)
@click.option(
    "--clients",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Clients at a time, for --app.  [default: 1, 8, 64, 512]",
    show_default=False,
)
@click.option(
    "--seconds", type=click.FloatRange(min=0.0), default=4.0, help="What a turn of --app takes, by its requests."
)
@click.option(
    "--contestant",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only these, such as 'encode' or 'asyncembed torch float32'.",
)
@click.option(
    "--token-limit",
    "limits",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="A limit for --sweep.  [default: 256 to 8192]",
    show_default=False,
)
@click.option("--model", default=DEFAULT_MODEL, help="A model's name or folder.")
@click.option("--device", default="cpu", help="Where it runs; OpenVINO competes on cpu only.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench-results"),
    help="Folder of results.json and chart.png, and of the files that jobs write meanwhile.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what is in results.json instead of the table.")
def main(**chosen: Any) -> None:
    """Measure how fast asyncembed is on this machine.

    Contestants run in turns, A B C A B C, each in a process of its own, so that a machine that is slow for a while is
    slow for all. Leave the machine alone meanwhile.
    """
    kinds = [kind for kind in ("compare", "sweep", "startup", "resume", "app") if chosen[kind]] or ["compare"]
    if chosen["clients"] and "app" not in kinds:
        raise click.UsageError("--clients goes with --app")
    chosen["rounds"] = chosen["rounds"] or (2 if kinds == ["app"] else 5)
    if chosen["limits"] and "sweep" not in kinds:
        raise click.UsageError("--token-limit goes with --sweep")
    chosen["out"].mkdir(parents=True, exist_ok=True)
    settings = {name: chosen[name] for name in ("texts", "rounds", "model", "device")}
    results: dict[str, Any] = {"version": 1, "machine": report.machine(), "settings": settings}
    with tempfile.TemporaryDirectory(dir=chosen["out"], prefix="work-") as work:
        _measure(kinds, chosen, Path(work).resolve(), results)
    written = json.dumps(results, indent=1)
    (chosen["out"] / "results.json").write_text(written + "\n")
    click.echo(written if chosen["as_json"] else report.tables(results))
    if "compare" in results:
        _draw(results, chosen["out"] / "chart.png")


def _measure(kinds: list[str], chosen: dict[str, Any], work: Path, results: dict[str, Any]) -> None:
    rounds = chosen["rounds"]
    if "compare" in kinds or "sweep" in kinds:
        plans = comparison.plans(chosen["model"], chosen["device"])
        plans = _choose([plan for plan in plans if plan.backend != "encode" or "compare" in kinds], chosen["names"])
        if "sweep" in kinds and all(plan.backend == "encode" for plan in plans):
            raise click.UsageError("--sweep needs a contestant with a token limit; encode has none")
    if kinds != ["resume"]:
        names = list(corpora.CORPORA) if chosen["corpus"] == "both" else [chosen["corpus"]]
        _say(f"making {chosen['texts']:,} texts for each of: {', '.join(names)}")
        files = {name: corpora.write(name, corpora.build(name, chosen["texts"]), work) for name in names}
    if "compare" in kinds or "sweep" in kinds:
        _say(f"loading {', '.join(plan.name for plan in plans)}")
        with Workers(plans, work) as workers:
            if "compare" in kinds:
                results["compare"] = comparison.compare(workers, files, rounds, _say)
            if "sweep" in kinds:
                limits = chosen["limits"] or comparison.SWEPT_LIMITS
                results["sweep"] = comparison.sweep(workers, files, limits, rounds, _say)
    if "startup" in kinds:
        file = next(iter(files.values()))
        results["startup"] = processes.startup(chosen["model"], chosen["device"], file, work, rounds, _say)
    if "resume" in kinds:
        results["resume"] = processes.resume(chosen["texts"], work, rounds, _say)
    if "app" in kinds:
        results["app"] = _measure_app(chosen, files, work)


def _measure_app(chosen: dict[str, Any], files: dict[str, Path], work: Path) -> dict[str, Any]:
    plans = _choose(app.plans(chosen["model"], chosen["device"]), chosen["names"])
    _say(f"loading {', '.join(plan.name for plan in plans)}")
    clients = chosen["clients"] or app.CLIENTS
    with Workers(plans, work, app_contestants.make) as workers:
        seconds = chosen["seconds"]
        return {
            "clients": app.measure(workers, files, clients, chosen["rounds"], seconds, _say),
            "beside_a_job": app.mixed(workers, files, chosen["rounds"], 2.5 * seconds, _say),
        }


def _choose(plans: Sequence[AnyPlan], names: tuple[str, ...]) -> list[AnyPlan]:
    """The plans of these names; all without any."""
    known = [plan.name for plan in plans]
    for name in names:
        if name not in known:
            raise click.UsageError(f"no contestant {name!r} here; there are: {', '.join(known)}")
    return [plan for plan in plans if not names or plan.name in names]


def _draw(results: dict[str, Any], path: Path) -> None:
    if not chart.can_draw():
        path.unlink(missing_ok=True)  # of an earlier run: it would not be of these results
        _say("no chart: matplotlib is not installed (pip install -c constraints.txt '.[bench]')")
        return
    chart.draw(results, path)
    _say(f"drew {path}")


def _say(line: str) -> None:
    click.echo(f"bench: {line}", err=True)


if __name__ == "__main__":
    main()
