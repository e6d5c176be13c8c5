"""How fast the model is here, measured on chunks of the input itself."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from asyncembed.encoders import Encoder
from asyncembed.heap import ChunkHeap
from asyncembed.limits import initial_limit
from asyncembed.options import EmbedOptions
from asyncembed.records import Chunk, FloatVector
from asyncembed.runner import ModelRunner

SAMPLE_CHUNKS = 512
MEASURE_S = 3.0


class Speed(NamedTuple):
    """A measurement.

    Attributes:
        n_tokens: Tokens that were embedded for it, special ones and prompt included.
        seconds: What that took.
    """

    n_tokens: int
    seconds: float

    def seconds_for(self, n_tokens: int) -> float | None:
        """What `n_tokens` would take; None if nothing could be measured."""
        return n_tokens * self.seconds / self.n_tokens if self.n_tokens else None


class Sample:
    """A fair sample of a stream of chunks: each has the same chance to be in it. The same stream gives the same one."""

    def __init__(self, size: int = SAMPLE_CHUNKS) -> None:
        self.chunks: list[Chunk] = []
        self._size = size
        self._n_seen = 0
        self._random = random.Random(0)

    def add(self, chunks: Iterable[Chunk]) -> None:
        """More of the stream."""
        for chunk in chunks:
            self._n_seen += 1
            if len(self.chunks) < self._size:
                self.chunks.append(chunk)
            elif (place := self._random.randrange(self._n_seen)) < self._size:
                self.chunks[place] = chunk


class Rehearsal:
    """Runs chunks in batches as a job would, and forgets the vectors."""

    def __init__(self, encoder: Encoder, options: EmbedOptions) -> None:
        self._runner = ModelRunner(encoder)
        self._limit = options.token_limit or initial_limit(encoder.device, encoder.slots)
        self._max_rows = options.batch_size

    def vectors(self, chunks: Sequence[Chunk]) -> list[FloatVector]:
        """The vectors of one batch at most; none if it fails. It also warms the model up."""
        heap = ChunkHeap()
        heap.push(tuple(chunks))
        batch = heap.take(self._limit, self._max_rows)
        outcome = (self._runner.advance(batch) or self._runner.advance(None)) if batch is not None else None
        return [] if outcome is None or outcome.vectors is None else list(outcome.vectors)

    def measure(self, chunks: Sequence[Chunk]) -> Speed:
        """Embed the chunks, or as many as `MEASURE_S` seconds allow."""
        heap = ChunkHeap()
        heap.push(tuple(chunks))
        n_tokens, started, now = 0, time.perf_counter(), time.perf_counter()
        while now - started < MEASURE_S:
            batch = heap.take(self._limit, self._max_rows)
            outcome = self._runner.advance(batch)
            if batch is None and outcome is None:
                break
            now = time.perf_counter()
            if outcome is not None and outcome.vectors is not None:
                n_tokens += outcome.batch.row_tokens
        while self._runner.advance(None) is not None:  # what is still under way was not counted
            pass
        return Speed(n_tokens, now - started)
