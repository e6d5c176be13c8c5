"""The two measurements that need loaded contestants: side by side, and over token limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.contestants import Plan
from tests.benchmarks.measure import Turn, digest, interleaved, speed
from tests.benchmarks.workers import Workers

Say = Callable[[str], None]
"""Tells a person how far it is."""

SWEPT_LIMITS = (256, 512, 1024, 2048, 4096, 8192)


def plans(model: str, device: str) -> list[Plan]:
    """All contestants that this machine can run."""
    if device != "cpu":
        return [
            Plan(model, device, "encode"),
            Plan(model, device, "torch", "float32"),
            Plan(model, device, "torch", "bfloat16"),
        ]
    found = [Plan(model, device, "encode"), Plan(model, device, "torch", "float32")]
    from asyncembed.encoders.openvino_encoder import is_installed

    if is_installed():
        from asyncembed.encoders.openvino_encoder import supported_dtypes

        able = supported_dtypes()
        found += [Plan(model, device, "openvino", dtype) for dtype in ("float32", "bfloat16", "int8") if dtype in able]
    return found


def compare(workers: Workers, files: Mapping[str, Path], n_rounds: int, say: Say) -> dict[str, Any]:
    """Every contestant over every corpus, in turns.

    Args:
        workers: The contestants.
        files: The corpora's files by name.
        n_rounds: Turns of each, after one that warms up and does not count.
        say: Is told of each turn.
    """
    owners = {turn: worker for worker in workers.all for turn in worker.plan.turns}
    found: dict[str, Any] = {}
    for name, file in files.items():
        facts = _warm_up(workers, name, file, say)
        turns: dict[str, list[Turn]] = {turn: [] for turn in owners}
        for number, turn in enumerate(interleaved(list(owners), n_rounds)):
            measured = owners[turn].measure(turn, file)
            turns[turn].append(measured)
            say(f"{name}, round {number // len(owners) + 1} of {n_rounds}: {turn} {measured.seconds:.2f} s")
        found[name] = {**facts, "rows": digest(turns, facts["n_texts"], facts["n_tokens"])}
    return found


def sweep(
    workers: Workers, files: Mapping[str, Path], limits: Sequence[int], n_rounds: int, say: Say
) -> dict[str, Any]:
    """The whole job at fixed token limits, for every contestant that has one; in turns too.

    Args:
        workers: The contestants.
        files: The corpora's files by name.
        limits: Limits of a batch in padded tokens.
        n_rounds: Turns of each limit, after one that does not count.
        say: Is told of each turn.
    """
    jobs = [worker for worker in workers.all if worker.plan.backend != "encode"]
    found: dict[str, Any] = {}
    for name, file in files.items():
        facts = jobs[0].describe(file)
        places = {f"{worker.plan.name} {limit}": (worker, limit) for worker in jobs for limit in limits}
        seconds: dict[str, list[float]] = {place: [] for place in places}
        for number, place in enumerate(interleaved(list(places), 1 + n_rounds)):
            worker, limit = places[place]
            measured = worker.measure(worker.plan.name, file, limit)
            if number >= len(places):  # a limit's own shapes are new to the model in its first round
                seconds[place].append(measured.seconds)
            say(f"{name}, limit {limit:,}: {worker.plan.name} {measured.seconds:.2f} s")
        rows = [
            {"name": worker.plan.name, "token_limit": limit}
            | speed(seconds[place], facts["n_texts"], facts["n_tokens"])
            for place, (worker, limit) in places.items()
        ]
        found[name] = {**facts, "rows": rows}
    return found


def _warm_up(workers: Workers, name: str, file: Path, say: Say) -> dict[str, Any]:
    """A whole run of each, so that caches, kernels and allocators are as in a long run; what the corpus is."""
    for worker in workers.all:
        started = time.perf_counter()
        worker.warm_up(file)
        say(f"{name}, warming up: {worker.plan.name} {time.perf_counter() - started:.2f} s")
    return workers.all[0].describe(file)
