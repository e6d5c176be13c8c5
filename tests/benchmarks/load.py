"""Closed-loop clients, and what their requests' seconds say: no model, no process."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

Ask = Callable[[str], Awaitable[object]]
"""One request of one text."""


@dataclass(slots=True)
class Load:
    """What one turn of clients measured.

    Attributes:
        seconds: The whole of it.
        latencies: Seconds of each request.
        batches: Batches of the model; None where it has none of its own.
        rows: Requests a batch, on average.
        padded_tokens: Tokens a batch, with padding, on average.
        cpu_seconds: Processor time of the process that answers, all its threads; None if not known.
    """

    seconds: float
    latencies: list[float]
    batches: int | None = None
    rows: float | None = None
    padded_tokens: float | None = None
    cpu_seconds: float | None = None

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.latencies) / self.seconds


def slice_of(texts: Sequence[str], start: int, n: int) -> list[str]:
    """`n` texts from `start` on, in a ring."""
    return list(islice(cycle(texts), start % len(texts), start % len(texts) + n))


async def closed_loop(ask: Callable[[int], Ask], texts: Sequence[str], n_clients: int) -> Load:
    """So many clients, each asking for the next text when it has its answer, until all texts are done.

    Args:
        ask: Gives the client of a number its way to ask.
        texts: One request each.
        n_clients: How many clients.
    """
    waiting = iter(texts)
    latencies: list[float] = []

    async def client(own: Ask) -> None:
        for text in waiting:
            started = time.perf_counter()
            await own(text)
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client(ask(number)) for number in range(n_clients)))
    return Load(time.perf_counter() - started, latencies)


async def arrivals(ask: Ask, texts: Sequence[str], per_second: float, until: asyncio.Future[Any]) -> list[float]:
    """Requests that arrive on their own, as a Poisson process, until something else is done: seconds of each."""
    latencies: list[float] = []

    async def one(text: str) -> None:
        started = time.perf_counter()
        await ask(text)
        latencies.append(time.perf_counter() - started)

    under_way = []
    for text, pause in zip(cycle(texts), _pauses(per_second), strict=False):
        await asyncio.wait([until], timeout=pause)
        if until.done():
            break
        under_way.append(asyncio.create_task(one(text)))
    await asyncio.gather(*under_way)
    return latencies


def n_requests(rate: float, n_clients: int, target_s: float) -> int:
    """Requests that take about `target_s` seconds at this rate, but at least one of each client."""
    return max(n_clients, round(rate * target_s), 1)


def digest(turns: Sequence[Load]) -> dict[str, Any]:
    """Figures of one contestant's turns: medians over rounds."""
    per_request = [turn.cpu_seconds / len(turn.latencies) for turn in turns if turn.cpu_seconds is not None]
    return {
        "requests": sum(len(turn.latencies) for turn in turns),
        "requests_per_second": statistics.median(turn.rate for turn in turns),
        "p50_s": statistics.median(percentile(turn, 50) for turn in turns),
        "p99_s": statistics.median(percentile(turn, 99) for turn in turns),
        "rows": _median([turn.rows for turn in turns if turn.rows is not None]),
        "padded_tokens": _median([turn.padded_tokens for turn in turns if turn.padded_tokens is not None]),
        "cpu_s": _median(per_request),
        "rates": [turn.rate for turn in turns],
    }


def against(turns: Sequence[Load], baseline: Sequence[Load] | None, measure: Callable[[Load], float]) -> float | None:
    """A figure as a multiple of the baseline's in the same round: the median over rounds."""
    if baseline is None:
        return None
    return statistics.median(measure(own) / measure(other) for own, other in zip(turns, baseline, strict=True))


def percentile(turn: Load, percent: float) -> float:
    """Seconds that so many percent of a turn's requests took at most."""
    return float(np.percentile(turn.latencies, percent))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _pauses(per_second: float) -> Iterator[float]:
    dice = random.Random(5)
    while True:
        yield dice.expovariate(per_second)
