"""Records and stores for the tests of the sinks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from asyncembed.records import EmbeddedChunk, EmbeddedText, text_id
from asyncembed.store import Store

DIM = 4
FINGERPRINT = {"weights": "abc", "dim": DIM, "prompt": None}
MADE_WITH = {"backend": "torch", "model": "tiny"}


def vector_of(text: str, dim: int = DIM) -> np.ndarray:
    """A vector that depends on the text alone."""
    return np.random.default_rng(int(text_id(text)[:8], 16)).standard_normal(dim).astype(np.float32)


def record(text: str, key: str | None = None, *, index: int = 0, cached: bool = False, dim: int = DIM) -> EmbeddedText:
    """A text of one chunk, embedded."""
    vector = vector_of(text, dim)
    chunks = (EmbeddedChunk(text, 0, 3, vector),)
    return EmbeddedText(text_id(text), index, key, text, vector, chunks, 3, cached=cached)


def failure(text: str, error: str = "too long", key: str | None = None) -> EmbeddedText:
    """A text that could not be embedded."""
    return EmbeddedText(text_id(text), 7, key, text, None, error=error, place="file.csv:8")


@contextlib.asynccontextmanager
async def opened(path: Path, fingerprint: dict[str, object] | None = None) -> AsyncIterator[Store]:
    """A store that is open and claimed, closed cleanly if the block ends without error."""
    store = Store(path)
    await store.open()
    complete = False
    try:
        await store.claim(fingerprint or FINGERPRINT, MADE_WITH)
        yield store
        complete = True
    finally:
        await store.aclose(complete=complete)


async def killed_after(path: Path, *batches: list[EmbeddedText]) -> None:
    """Leave a folder as a killed run would: batches committed, ledger and index not completed."""
    store = Store(path)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    for batch in batches:
        await store.commit(batch)
    await store.aclose(complete=False)


def ids(*texts: str) -> list[str]:
    """The ids of some texts."""
    return [text_id(text) for text in texts]


async def is_done(store: Store, *texts: str) -> list[bool]:
    """Whether an earlier run has saved each text."""
    return [found.is_done for found in await store.find(texts)]
