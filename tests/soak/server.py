"""A server under a long load of texts of all lengths: its memory has to level off."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import anyio
import httpx
import psutil

from tests.conftest import ROOT
from tests.soak.figures import Figures

N_CALLERS = 64
LIST_SIZES = (1, 4, 32)
WARM_MINUTES = 2
"""Minutes after which the memory must be level."""

MOST_GROWTH = 50 * 10**6
SAMPLE_EVERY_S = 2.0
WORDS = ("the", "boat", "left", "harbour", "before", "a", "storm", "and", "heron", "on", "river", "in", "may")


def storm(minutes: float, seed: int, work: Path) -> Iterator[Figures]:
    """64 callers with lists of 1, 4 and 32 texts of 1 to 250 words, for so many minutes, the first two to warm up."""
    work.mkdir(parents=True, exist_ok=True)
    yield asyncio.run(_load(60 * minutes, seed, work))


async def _load(seconds: float, seed: int, work: Path) -> Figures:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryFile("w+", dir=work) as said,
        subprocess.Popen(
            [sys.executable, "-m", "asyncembed.server", "--port", "0"], cwd=ROOT, env=environment, stderr=said
        ) as server,
    ):
        try:
            url = await _address(said.fileno(), server)
            process, samples, counts = psutil.Process(server.pid), [], {"requests": 0, "texts": 0, "errors": 0}
            end = time.monotonic() + seconds
            limits = httpx.Limits(max_connections=N_CALLERS)
            async with (
                httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client,
                anyio.create_task_group() as callers,
            ):
                for number in range(N_CALLERS):
                    callers.start_soon(_call, client, random.Random(seed * 1000 + number), end, counts)
                started = time.monotonic()
                while (now := time.monotonic()) < end:
                    samples.append((now - started, process.memory_info().rss))
                    await asyncio.sleep(min(SAMPLE_EVERY_S, max(0.1, end - now)))
        finally:
            server.terminate()
            server.wait()
    minutes: dict[int, list[int]] = {}
    for at, rss in samples:
        minutes.setdefault(int(at // 60), []).append(rss)
    levels = [median(found) for _, found in sorted(minutes.items())]  # lists under way come and go on top
    growth = int(max(levels) - levels[WARM_MINUTES])
    figures: dict[str, int | float | str] = {
        **counts,
        "requests/s": round(counts["requests"] / seconds, 1),
        "texts/s": round(counts["texts"] / seconds, 1),
        "MB each minute": " ".join(str(round(level / 1e6)) for level in levels),
        "peak MB": max(rss for _, rss in samples) // 10**6,
        "growth after two minutes, MB": growth // 10**6,
    }
    broken = [f"it grew by {growth // 10**6} MB after two minutes"] if growth > MOST_GROWTH else []
    if counts["errors"]:
        broken.append(f"{counts['errors']} requests failed")
    return Figures(f"server, {N_CALLERS} callers, {seconds / 60:g} min", figures, tuple(broken))


async def _address(log: int, server: subprocess.Popen[bytes]) -> str:
    """Wait until the server says that it is ready; its address."""
    while server.poll() is None:
        text = os.pread(log, 1 << 16, 0).decode(errors="replace")
        found = re.search(r"listening on (\S+?),", text)
        if found and "ready:" in text:
            return found[1]
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the server ended with {server.returncode}")


async def _call(client: httpx.AsyncClient, rng: random.Random, end: float, counts: dict[str, int]) -> None:
    while time.monotonic() < end:
        n_texts = rng.choice(LIST_SIZES)
        texts = [f"{rng.random()} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 250))) for _ in range(n_texts)]
        answer = await client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"})
        counts["requests"] += 1
        counts["texts"] += n_texts
        counts["errors"] += answer.status_code != 200
