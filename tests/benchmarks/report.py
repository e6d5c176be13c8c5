"""What was measured, for a person and for a program."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

VERSIONS = ("asyncembed", "sentence-transformers", "torch", "transformers", "tokenizers", "openvino", "numpy")
NOTHING = "-"

Column = tuple[str, str, Callable[[Any], str]]
"""A heading, the name of its figure, and how that is written."""

_SPEED: list[Column] = [
    ("texts/s", "texts_per_second", lambda value: f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"),
    ("tokens/s", "tokens_per_second", lambda value: f"{value:,.0f}"),
]
COLUMNS: dict[str, list[Column]] = {
    "compare": [
        *_SPEED,
        ("x encode", "times_encode", lambda value: f"{value:.2f}"),
        ("of bare loop", "part_of_bare_loop", lambda value: f"{value:.1%}"),
        ("padding", "padding", lambda value: f"{value:.1%}"),
        ("memory", "peak_bytes", lambda value: f"{value / 1e6:,.0f} MB"),
        ("first record", "first_s", lambda value: f"{value:.2f} s"),
        ("median", "median_s", lambda value: f"{value:.2f} s"),
        ("slowest/fastest", "seconds", lambda value: f"{max(value) / min(value):.2f}"),
    ],
    "sweep": [("limit", "token_limit", lambda value: f"{value:,}"), *_SPEED],
    "startup": [
        ("first result", "first_s", lambda value: f"{value:.2f} s"),
        ("whole process", "total_s", lambda value: f"{value:.2f} s"),
        ("slowest/fastest", "seconds", lambda value: f"{max(value) / min(value):.2f}"),
    ],
    "app": [
        ("requests/s", "requests_per_second", lambda value: f"{value:,.1f}"),
        ("x encode", "times_encode", lambda value: f"{value:.2f}"),
        ("p50", "p50_s", lambda value: f"{1000 * value:,.1f} ms"),
        ("p99", "p99_s", lambda value: f"{1000 * value:,.1f} ms"),
        ("p99 of encode's", "p99_of_encode", lambda value: f"{value:.2f}"),
        ("p50 of a bare call", "p50_of_bare", lambda value: f"{value:.2f}"),
        ("requests/batch", "rows", lambda value: f"{value:.1f}"),
        ("tokens/batch", "padded_tokens", lambda value: f"{value:,.0f}"),
        ("processor/request", "cpu_s", lambda value: f"{1000 * value:.1f} ms"),
    ],
    "beside": [
        ("requests", "requests", lambda value: f"{value:,}"),
        ("p50", "p50_s", lambda value: f"{1000 * value:,.1f} ms"),
        ("p99", "p99_s", lambda value: f"{1000 * value:,.1f} ms"),
        ("from batch to batch", "batch_s", lambda value: f"{1000 * value:,.1f} ms"),
        ("job's texts/s", "texts_per_second", lambda value: f"{value:,.1f}"),
        ("of the job alone", "part_of_alone", lambda value: f"{value:.1%}"),
    ],
    "resume": [_SPEED[0], ("median", "median_s", lambda value: f"{value:.3f} s")],
}
LEGEND = """\
x encode: median over rounds of the seconds of encode over its own. of bare loop: the same, over the bare loop of its
model. padding: padded tokens over useful ones. memory: the most above the loaded model, of all rounds; for a later
corpus it includes what the allocator kept of an earlier one. first record: until it is saved (encode: until all are
there)."""

APP_LEGEND = """\
Each client asks for one text, waits for its vector and asks again. encode: one call a request in a thread pool of one.
x encode, p99 of encode's, p50 of a bare call: medians over rounds of the ratio within a round; a bare call is encode
without an event loop, one caller. requests/batch and tokens/batch (with padding): the mean fill. processor/request: of
the process that answers, all its threads. beside a job: short texts that arrive at random, while a job takes all the
model gives. from batch to batch: between the ends of two; where several run at once, each takes that much longer."""


def machine() -> dict[str, Any]:
    """What it ran on, and with what."""
    versions: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "processor": _processor(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(facts: dict[str, Any]) -> str:
    """A machine in two lines."""
    known = [f"{name} {number}" for name, number in facts["versions"].items() if number is not None]
    return f"{facts['cores']} cores of {facts['processor']}, Python {facts['python']}\n{', '.join(known)}"


def tables(results: dict[str, Any]) -> str:
    """Everything in words."""
    parts = [describe(results["machine"])]
    for kind in ("compare", "sweep"):
        for name, corpus in results.get(kind, {}).items():
            tokens = corpus["tokens_of_a_text"]
            parts.append(
                f"{kind}, corpus {name}: {corpus['n_texts']:,} texts of {tokens['p10']} to {tokens['p90']} tokens "
                f"(mean {tokens['mean']}, {corpus['n_cut']} cut), {results['settings']['rounds']} rounds\n"
                + table(COLUMNS[kind], corpus["rows"])
            )
    parts += [f"{kind}\n" + table(COLUMNS[kind], results[kind]) for kind in ("startup", "resume") if kind in results]
    if "app" in results:
        parts += _app_tables(results["app"])
    return "\n\n".join(parts + ([LEGEND] if "compare" in results else []))


def _app_tables(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    cells = dict.fromkeys((row["corpus"], row["clients"]) for row in found["clients"])
    for corpus, clients in cells:
        rows = [row for row in found["clients"] if (row["corpus"], row["clients"]) == (corpus, clients)]
        yield f"app, corpus {corpus}, {clients} clients\n" + table(COLUMNS["app"], rows)
    if found["beside_a_job"]:
        yield "5 requests a second beside a job\n" + table(COLUMNS["beside"], found["beside_a_job"])
    yield APP_LEGEND


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """Rows under headings, figures to the right."""
    lines = [["", *(heading for heading, _, _ in columns)]]
    lines += [[row["name"], *_cells(columns, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _cells(columns: Sequence[Column], row: dict[str, Any]) -> Iterator[str]:
    for _, name, write in columns:
        yield NOTHING if row[name] is None else write(row[name])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
