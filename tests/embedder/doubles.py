"""A model that a test holds in its hand, and waiting for what an embedder says of itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from asyncembed import AsyncEmbedder
from asyncembed.records import Batch
from tests.fakes import FakeEncoder


class Gate:
    """Holds the model at the beginning of every batch until the test lets it go; keeps what was in each."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Queue[list[str]] = asyncio.Queue()
        self._go = threading.Semaphore(0)

    def __call__(self, batch: Batch) -> None:
        texts = [chunk.text for chunk in batch.chunks]
        self.batches.append(texts)
        self._loop.call_soon_threadsafe(self._begun.put_nowait, texts)
        assert self._go.acquire(timeout=60)

    async def begun(self) -> list[str]:
        """The texts of the next batch that has begun."""
        with anyio.fail_after(60):
            return await self._begun.get()

    def let_go(self, times: int = 1) -> None:
        self._go.release(times)


def held_model(**settings: Any) -> tuple[Gate, FakeEncoder]:
    """A gate and a model behind it."""
    gate = Gate()
    return gate, FakeEncoder(on_batch=gate, **settings)


@asynccontextmanager
async def busy(**settings: Any) -> AsyncIterator[tuple[AsyncEmbedder, Gate]]:
    """An embedder whose model is in the midst of a batch of one text; at the end all is let go, and nothing is left."""
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder, **settings) as embedder:
        ahead = embedder.embed_nowait("ahead")
        assert await gate.begun() == ["ahead"]
        yield embedder, gate
        gate.let_go(100)
        assert (await ahead).tolist() == vector("ahead")
        await until(lambda: at_rest(embedder))


async def until(check: Callable[[], bool]) -> None:
    """Turn the loop until something is as wanted; other tasks and threads do their work meanwhile."""
    with anyio.fail_after(60):
        while not check():
            await anyio.lowlevel.checkpoint()


async def until_waiting(embedder: AsyncEmbedder, n_chunks: int) -> None:
    """Wait until so many chunks wait for the model."""
    await until(lambda: embedder.statistics().waiting_chunks == n_chunks)


def at_rest(embedder: AsyncEmbedder) -> bool:
    """Whether nothing is left of any request."""
    now = embedder.statistics()
    return (now.pending_requests, now.waiting_texts, now.pending_bytes, now.waiting_chunks) == (0, 0, 0, 0)


def vector(text: str) -> list[float]:
    """What `FakeEncoder` makes of a text of one chunk."""
    words = text.split()
    return [3 + sum(100 + len(word) for word in words), len(words) + 2, 1, 0]
