"""Memory that runs out in earnest, and memory that is held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.soak.figures import Figures

LIMITS = (("torch", 150), ("torch", 200), ("torch", 300), ("torch", 400), ("openvino", 600))
"""Backend, and MiB of address space above the loaded model.

Torch with 100 is too close: what its threads' stacks take decides whether single texts fit. OpenVINO with 400 or less
is no test of ours: what a stream allocated before it failed stays taken until the process ends, so that in the end not
even single chunks fit, and with 300 it has died of a segmentation fault.
"""

N_TEXTS = 200
HELD = ((1_000_000, 44, 256 << 20), (3, 5_000_000, 256 << 20), (2, 50_000_000, 1 << 30))
"""Texts, characters of each, and the budget."""

GROWN = (50_000, 300_000, 20_000_000)
"""Short texts before the measurement and in all, and the bytes by which the process may grow between."""


def storm(seed: int, work: Path) -> Iterator[Figures]:
    """Jobs that do not fit at five limits, each with a second one that knows it; then sources faster than the model.

    Last a long stream. Nothing here is random, so the seed is not used.
    """
    for number, (backend, n_mib) in enumerate(LIMITS):
        yield _exhausted(backend, n_mib, work / str(number))
    for n_texts, n_chars, budget in HELD:
        yield _held(n_texts, n_chars, budget, work)
    yield _grown(*GROWN, work)


def _exhausted(backend: str, n_mib: int, cache: Path) -> Figures:
    name = f"{backend}, model + {n_mib} MiB"
    found = []
    for number in range(2):  # a process each: what the first leaves taken is not the second's to learn
        bound = [str(found[0]["bound"])] if number else []
        job = _child(cache, "exhausted", backend, str(n_mib), str(N_TEXTS), *bound)
        if isinstance(job, str):
            return Figures(name, {}, (job,))
        found.append(job)
    first, second = found
    broken = []
    if first["embedded"] != N_TEXTS or second["embedded"] != N_TEXTS:
        broken.append(f"{first['embedded']} and {second['embedded']} of {N_TEXTS} texts embedded")
    if second["largest"] >= first["largest"]:
        broken.append("the second job tried again what had failed")
    figures = {
        "texts": first["texts"],
        "finished": first["embedded"],
        "ooms": first["ooms"],
        "limit": first["token_limit"],
        "peak MB": first["peak_rss_bytes"] // 10**6,
        "second job's ooms": second["ooms"],
    }
    return Figures(name, figures, tuple(broken))


def _held(n_texts: int, n_chars: int, budget: int, work: Path) -> Figures:
    name = f"{n_texts:,} texts of {n_chars:,} characters, {budget // 10**6} MB allowed"
    found = _child(work / "held", "held", str(n_texts), str(n_chars), str(budget))
    if isinstance(found, str):
        return Figures(name, {}, (found,))
    above = found["above_model"]
    broken = (f"it took {above} bytes",) if above > budget else ()
    return Figures(name, {"finished": found["embedded"], "peak above the model, MB": above // 10**6}, broken)


def _grown(n_before: int, n_texts: int, most: int, work: Path) -> Figures:
    name = f"{n_texts:,} short texts, flat from {n_before:,} on"
    found = _child(work / "grown", "grown", str(n_before), str(n_texts))
    if isinstance(found, str):
        return Figures(name, {}, (found,))
    grown = found["grown_bytes"]
    broken = (f"it grew by {grown} bytes",) if grown >= most or found["n_texts"] != n_texts else ()
    return Figures(name, {"finished": found["n_texts"], "growth, MB": grown // 10**6}, broken)


def _child(cache: Path, *arguments: str) -> Any:
    """What a job in a process and with a cache of its own printed; how it ended, as text, if it did not end well."""
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "tests.children", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
    return f"exit code {done.returncode}: {said}"
