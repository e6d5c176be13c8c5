"""Encoders written by hand, and chunks made of nothing but their length."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from asyncembed.encoders.base import FloatMatrix, Tokenized, Tokenizer
from asyncembed.records import Batch, Chunk

_IDS = np.arange(1, 4097, dtype=np.int32)


def chunk(length: int, *, owner: int = 0, ordinal: int = 0, priority: int = 0, n_tokens: int | None = None) -> Chunk:
    """A chunk of `length` tokens."""
    weight = max(1, length - 2) if n_tokens is None else n_tokens
    return Chunk(owner, ordinal, f"text {owner}", 0, _IDS[:length], weight, priority)


def chunks(lengths: Sequence[int], *, priority: int = 0) -> list[Chunk]:
    """Chunks of as many texts, numbered from 0."""
    return [chunk(length, owner=owner, priority=priority) for owner, length in enumerate(lengths)]


def vector_of(item: Chunk) -> np.ndarray:
    """What `FakeEncoder` makes of a chunk: no two chunks of a test have the same."""
    return np.array([item.owner + 1, item.ordinal + 1, item.length], np.float32)


class FakeEncoder:
    """A model of three dimensions, with a device that fails as it is told to.

    It proves by itself that calls come from one thread, one at a time, and that no more batches are under way than
    it has slots.

    Args:
        slots: Batches it can have under way.
        capacity: Padded tokens that fit into its memory; None for no bound.
        error_of: Asked for every batch: the error that it ends in, or None.
        fail_in_start: Whether failures come from `start`; otherwise from `finish`.
        on_start: Called at the beginning of `start`, in the model's thread.
    """

    name = "fake"
    device = "cpu"
    backend = "fake"
    dtype = "float32"
    dim = 3
    max_tokens = 4096
    prompt = ""

    def __init__(
        self,
        *,
        slots: int = 1,
        capacity: int | None = None,
        error_of: Callable[[Batch], Exception | None] | None = None,
        fail_in_start: bool = False,
        on_start: Callable[[Batch], None] | None = None,
    ) -> None:
        self.slots = slots
        self.started: list[Batch] = []
        self.finished: list[Batch] = []
        self.threads: set[int] = set()
        self.most_under_way = 0
        self.times_freed = 0
        self._capacity = capacity
        self._error_of = error_of
        self._fail_in_start = fail_in_start
        self._on_start = on_start
        self._under_way = 0
        self._inside = threading.Lock()

    def tokenizer(self) -> Tokenizer:
        return NoTokenizer()

    def start(self, batch: Batch) -> Any:
        with _Alone(self):
            self.started.append(batch)
            if self._on_start is not None:
                self._on_start(batch)
            if self._fail_in_start:
                self._raise_for(batch)
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
            return batch

    def finish(self, handle: Any) -> FloatMatrix:
        with _Alone(self):
            self._under_way -= 1
            self.finished.append(handle)
            if not self._fail_in_start:
                self._raise_for(handle)
            return np.stack([vector_of(item) for item in handle.chunks])

    def free_memory(self) -> None:
        self.times_freed += 1

    def fingerprint(self) -> Mapping[str, Any]:
        return {"model": "fake"}

    def made_with(self) -> Mapping[str, Any]:
        return {}

    def _raise_for(self, batch: Batch) -> None:
        if self._capacity is not None and batch.padded_tokens > self._capacity:
            raise RuntimeError(f"CUDA out of memory. Tried to allocate {batch.padded_tokens} tokens")
        error = self._error_of(batch) if self._error_of is not None else None
        if error is not None:
            raise error


class _Alone:
    """Fails if another call is inside."""

    def __init__(self, encoder: FakeEncoder) -> None:
        self._encoder = encoder

    def __enter__(self) -> None:
        if not self._encoder._inside.acquire(blocking=False):
            raise AssertionError("two calls of the model overlapped")
        self._encoder.threads.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self._encoder._inside.release()


class NoTokenizer:
    """Stands where a tokenizer is not used."""

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        raise AssertionError("no text is tokenised here")

    def spans(self, text: str) -> list[tuple[int, int]]:
        raise AssertionError("no text is tokenised here")
