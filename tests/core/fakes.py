"""Encoders written by hand, and chunks made of nothing but their length."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from asyncembed.encoders.base import FloatMatrix, Tokenized, Tokenizer
from asyncembed.engine.heap import ChunkHeap
from asyncembed.engine.work import Client, Work
from asyncembed.records import Batch, Chunk

_IDS = np.arange(1, 4097, dtype=np.int32)


NOBODY = Client()
"""Whose texts they are before a `Heap` or a `Bench` takes them."""


def work(
    *lengths: int, owner: int = 0, priority: int = 0, client: Client = NOBODY, weights: Sequence[int] = ()
) -> Work:
    """A text, named by a number, of chunks of so many tokens each."""
    made = Work(client, str(owner), priority)
    made.waiters.append(made)
    weights = weights or [max(1, length - 2) for length in lengths]
    made.chunks = tuple(
        Chunk(made, number, f"text {owner}", 0, _IDS[:length], weight)
        for number, (length, weight) in enumerate(zip(lengths, weights, strict=True))
    )
    made.expect()
    return made


def works(lengths: Sequence[int], *, priority: int = 0, client: Client = NOBODY) -> list[Work]:
    """As many texts of one chunk, numbered from 0."""
    return [work(length, owner=owner, priority=priority, client=client) for owner, length in enumerate(lengths)]


def chunk(length: int) -> Chunk:
    """The chunk of a text."""
    return work(length).chunks[0]


def chunks(lengths: Sequence[int]) -> list[Chunk]:
    """The chunks of as many texts, numbered from 0."""
    return [made.chunks[0] for made in works(lengths)]


def owner_of(item: Chunk) -> int:
    """The number of a chunk's text."""
    return int(item.work.text)


def owners(batch: Batch) -> set[int]:
    """The numbers of the texts in a batch."""
    return set(map(owner_of, batch.chunks))


class Heap(ChunkHeap):
    """A heap with a client whose texts they are, unless they have one."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.client = Client()

    def push(self, works: Iterable[Work]) -> None:
        pushed = list(works)
        for one in pushed:
            if one.client is NOBODY:
                one.client = self.client
        super().push(pushed)


def vector_of(item: Chunk) -> np.ndarray:
    """What `FakeEncoder` makes of a chunk: no two chunks of a test have the same."""
    return np.array([owner_of(item) + 1, item.ordinal + 1, item.length], np.float32)


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
