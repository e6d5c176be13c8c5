"""`--app`: concurrent clients in turns, and requests beside a job."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import corpora
from tests.benchmarks.app_contestants import BARE, AppPlan
from tests.benchmarks.comparison import Say
from tests.benchmarks.load import Load, against, digest, n_requests, percentile, slice_of
from tests.benchmarks.workers import Worker, Workers

CLIENTS = (1, 8, 64, 512)
INTERACTIVE_PER_SECOND = 5.0
WARM_UP_REQUESTS = 12
BULK_S = 10.0
"""Seconds that the job beside requests shall take: some fifty requests."""


def plans(model: str, device: str) -> list[AppPlan]:
    """All contestants that this machine can run."""
    precisions = [("torch", "float32")]
    if device == "cpu":
        from asyncembed.encoders.openvino_encoder import is_installed

        if is_installed():
            from asyncembed.encoders.openvino_encoder import supported_dtypes

            precisions.insert(0, ("openvino", "float32"))
            if "bfloat16" in supported_dtypes():
                precisions.insert(1, ("openvino", "bfloat16"))
    found = [AppPlan(model, device, "encode")]
    for over_http in (False, True):
        found += [AppPlan(model, device, *precision, over_http=over_http) for precision in precisions]
    return found


def measure(
    workers: Workers, files: Mapping[str, Path], clients: Sequence[int], n_rounds: int, target_s: float, say: Say
) -> list[dict[str, Any]]:
    """Every contestant under every number of clients, over every corpus.

    Args:
        workers: The contestants.
        files: The corpora's files by name.
        clients: Numbers of clients.
        n_rounds: Turns of each, after a short one that warms up and tells its pace.
        target_s: Seconds that a turn shall take, by the number of its requests; each client makes one at least.
        say: Is told of each turn.

    Returns:
        A row for each contestant of each corpus and number of clients.
    """
    rows = []
    for name, file in files.items():
        texts = corpora.read(file)
        for n_clients in clients:
            turns = _turns(workers.all, texts, n_clients, n_rounds, target_s, f"{name}, {n_clients} clients", say)
            encode, bare = turns.get("encode"), turns.get(BARE)
            for contestant, own in turns.items():
                rows.append(
                    {"name": contestant, "corpus": name, "clients": n_clients, **digest(own)}
                    | {
                        "times_encode": against(own, encode, lambda turn: turn.rate),
                        "p99_of_encode": against(own, encode, lambda turn: percentile(turn, 99)),
                        "p50_of_bare": against(own, bare, lambda turn: percentile(turn, 50)),
                    }
                )
    return rows


def mixed(
    workers: Workers, files: Mapping[str, Path], n_rounds: int, target_s: float, say: Say
) -> list[dict[str, Any]]:
    """A job that takes all the model gives, alone and with requests beside it, in turns; in process only."""
    rows = []
    texts = corpora.read(files.get("docs") or next(iter(files.values())))
    short = corpora.read(files.get("short") or next(iter(files.values())))
    for worker in workers.all:
        if not worker.plan.name.startswith("in process"):
            continue
        probe = texts[: min(len(texts), 200)]
        seconds, _, _ = worker.ask("bulk", probe, [], INTERACTIVE_PER_SECOND)
        bulk = slice_of(_once(texts), 0, min(len(texts), max(1, round(len(probe) / seconds * target_s))))
        alone: list[float] = []
        beside: list[tuple[float, list[float], float]] = []
        for number in range(n_rounds):
            alone.append(worker.ask("bulk", bulk, [], INTERACTIVE_PER_SECOND)[0])
            beside.append(worker.ask("bulk", bulk, short, INTERACTIVE_PER_SECOND))
            say(
                f"beside a job, round {number + 1} of {n_rounds}: {worker.plan.name} {alone[-1]:.2f} s alone, "
                f"{beside[-1][0]:.2f} s with {len(beside[-1][1])} requests"
            )
        pooled = Load(1.0, [one for _, latencies, _ in beside for one in latencies] or [0.0])
        rows.append(
            {
                "name": worker.plan.name,
                "requests": len(pooled.latencies),
                "p50_s": percentile(pooled, 50),
                "p99_s": percentile(pooled, 99),
                "batch_s": statistics.median(batch_s for _, _, batch_s in beside),
                "texts_per_second": len(bulk) / statistics.median(one for one, _, _ in beside),
                "part_of_alone": statistics.median(
                    one / other for one, (other, _, _) in zip(alone, beside, strict=True)
                ),
            }
        )
    return rows


def _turns(
    workers: Sequence[Worker], texts: list[str], n_clients: int, n_rounds: int, target_s: float, what: str, say: Say
) -> dict[str, list[Load]]:
    """Turns of each contestant, and of a bare call where there is one client."""
    pace: dict[str, float] = {}
    turns: dict[str, list[Load]] = {}
    n_warm = max(WARM_UP_REQUESTS, min(n_clients, 128))
    for worker in workers:
        for _ in range(2):  # the first pays for what is done once, and its pace says little
            warm: Load = worker.ask("measure", slice_of(texts, 0, n_warm), n_clients)
        pace[worker.plan.name] = warm.rate
    at = n_warm
    for number in range(n_rounds):
        longest = 0
        for worker in workers:
            name = worker.plan.name
            n = n_requests(pace[name], n_clients, target_s)
            longest = max(longest, n)
            load: Load = worker.ask("measure", slice_of(texts, at, n), n_clients)
            turns.setdefault(name, []).append(load)
            say(f"{what}, round {number + 1} of {n_rounds}: {name} {load.rate:.1f}/s in {load.seconds:.1f} s")
            if name == "encode" and n_clients == 1:
                turns.setdefault(BARE, []).append(worker.ask("bare", slice_of(texts, at, n)))
        at += longest
    return turns


def _once(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))
