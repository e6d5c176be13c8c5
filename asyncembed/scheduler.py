"""What the model runs next, and what becomes of a batch that failed: pure, without loop, clock or thread.

The asynchronous consumer and the step-by-step class are two drivers of the same scheduler: what one retries, halves or
gives up, the other does alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple, Protocol

from asyncembed.encoders.failures import FailureKind
from asyncembed.errors import KilledBeforeError, ModelError
from asyncembed.heap import ChunkHeap
from asyncembed.records import Batch, Chunk
from asyncembed.wording import plural

BROKEN_AFTER = 16
"""Chunks that fail alone, none passing between them, before it is asked whether the model is broken."""

FULL = 0.9
"""A prepared batch this full of useful tokens is not chosen anew when more chunks arrive."""

FULL_IF_SMALL = 0.5
"""The same of one that was cut for less than the limit: of rows alike in length one more would not fit."""


class LimitEstimator(Protocol):
    """What the engine asks of a `TokenLimitEstimator` or its replacement."""

    def __call__(self) -> int:
        """The current limit of a batch in padded tokens."""
        ...

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """A batch of so many padded tokens ran; None if it is no sample of the limit's speed."""
        ...

    def fail(self, n_tokens: int) -> None:
        """A batch of so many padded tokens ran out of memory."""
        ...


def current_limit(estimator: LimitEstimator) -> int:
    """The limit in padded tokens, at least 1 whatever a replaced estimator says."""
    return max(1, int(estimator()))


class FailedChunk(NamedTuple):
    """A chunk that is given up, and why."""

    chunk: Chunk
    reason: str


class Scheduler:
    """Chooses batches from the heap and from what is left of batches that failed."""

    def __init__(
        self,
        heap: ChunkHeap,
        estimator: LimitEstimator,
        *,
        max_rows: int | None,
        is_wanted: Callable[[Chunk], bool],
    ) -> None:
        self.has_probe = False
        self._heap = heap
        self._estimator = estimator
        self._max_rows = max_rows
        self._is_wanted = is_wanted
        self._retries: deque[Batch] = deque()  # parts of batches that failed; none of them has `waited`
        self._retry_waited = False
        self._second_chance: set[Chunk] = set()
        self._failed_in_a_row = 0
        self._passed: Chunk | None = None
        self._probe: Batch | None = None

    def __bool__(self) -> bool:
        return bool(self._retries or self._heap)

    def __repr__(self) -> str:
        return f"<Scheduler retries={len(self._retries)} {self._heap!r}>"

    def next_batch(self, held: Collection[int] = (), n_idle: int = 1) -> Batch | None:
        """A part of a batch that failed, else the heap's choice; None if nothing may run.

        Where several slots of the model are idle, a new batch is the smaller: they share what waits.
        """
        batch = self._next_retry(held)
        if batch is not None:
            return batch
        share = max(1, -(-self._heap.n_tokens // n_idle)) if n_idle > 1 else None
        return self._heap.take(current_limit(self._estimator), self._max_rows, held, share=share)

    def put_back(self, batch: Batch) -> None:
        """Enqueue a batch again that was not run.

        A part of one that failed stays as it is: mixed with others, the search for the text at fault would begin anew.
        """
        if not batch.waited:
            self._retries.appendleft(batch)
        elif (wanted := self._wanted_of(batch)) is not None:
            self._heap.put_back(wanted)

    def succeeded(self, batch: Batch) -> bool:
        """Learn that a batch ran: whether its vectors are of use, which a probe's are not.

        The limit is told by the driver, which knows how long it took.
        """
        if batch is self._probe:
            self._end_probe()
            return False
        self._failed_in_a_row, self._passed = 0, batch.chunks[0]
        self._second_chance.difference_update(batch.chunks)
        return True

    def failed(self, batch: Batch, kind: FailureKind, error: BaseException | None) -> FailedChunk | None:
        """Learn that a batch failed; its chunks are tried again, but for one that is given up.

        Raises:
            ModelError: The device is dead, or the model fails on every chunk it is given.
        """
        # 1. The device is dead: stop. 2. A probe: the model is broken. 3. Out of memory: a lower limit, and the batch
        # in parts. 4. Anything else may be one text's fault: find it by halving.
        if isinstance(error, ModelError) and kind is not FailureKind.OUT_OF_MEMORY:
            raise error
        if kind is FailureKind.FATAL:
            raise ModelError(f"the device cannot go on: {error}") from error
        if batch is self._probe:
            self._end_probe()
            raise _broken_model(error)
        if kind is FailureKind.OUT_OF_MEMORY:
            self._estimator.fail(batch.padded_tokens)
        if len(batch.chunks) > 1:
            self._retries.extendleft(replace(half, waited=()) for half in reversed(batch.halves()))
            return None
        return self._fail_alone(batch.chunks[0], kind, error)

    def is_urgent_beside(self, batch: Batch, held: Collection[int] = ()) -> bool:
        """Whether something waits that is more urgent than all in the batch."""
        urgent = self._heap.most_urgent(held)
        return urgent is not None and urgent < min(chunk.priority for chunk in batch.chunks)

    def is_full(self, batch: Batch) -> bool:
        """Whether a batch that has not begun is not worth choosing anew."""
        if self._max_rows is not None and len(batch.chunks) >= self._max_rows:
            return True
        part = FULL_IF_SMALL if batch.is_small else FULL
        return batch.row_tokens >= part * (batch.limit or current_limit(self._estimator))

    def _next_retry(self, held: Collection[int]) -> Batch | None:
        """The next part of a batch that failed; None if there is none, or something more urgent goes between two."""
        while self._retries:
            batch = self._wanted_of(self._retries[0])
            if batch is not None and self.is_urgent_beside(batch, held) and not self._retry_waited:
                self._retry_waited = True
                return None
            self._retries.popleft()
            if batch is None:
                continue
            self._retry_waited = False
            while len(batch.chunks) > 1 and batch.padded_tokens > current_limit(self._estimator):
                batch, rest = batch.halves()
                self._retries.appendleft(rest)
            return batch
        return None

    def _wanted_of(self, batch: Batch) -> Batch | None:
        """The batch without chunks that nobody waits for any more; None if none is left. The probe is always wanted."""
        if batch is self._probe or all(map(self._is_wanted, batch.chunks)):
            return batch
        wanted = set(filter(self._is_wanted, batch.chunks))
        self._second_chance.difference_update(set(batch.chunks).difference(wanted))
        return batch.part([row for row, chunk in enumerate(batch.chunks) if chunk in wanted]) if wanted else None

    def _fail_alone(self, chunk: Chunk, kind: FailureKind, error: BaseException | None) -> FailedChunk | None:
        if kind is FailureKind.OUT_OF_MEMORY:
            # Once more, after what waits: memory that a neighbour or an earlier failure holds may be free by then.
            if chunk not in self._second_chance:
                self._second_chance.add(chunk)
                self._retries.append(Batch((chunk,)))
                return None
            self._second_chance.discard(chunk)
            return FailedChunk(chunk, f"a chunk of {plural(chunk.length, 'token')} does not fit into memory even alone")
        if isinstance(error, KilledBeforeError):  # says nothing about the model
            return FailedChunk(chunk, str(error))
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= BROKEN_AFTER and self._probe is None:
            self._begin_probe(error)
        return FailedChunk(chunk, f"the model failed on it: {type(error).__name__}: {error}")

    def _begin_probe(self, error: BaseException | None) -> None:
        """Bad texts may come in a row. Whether it is the model, a chunk that it took before will tell."""
        if self._passed is None:
            raise _broken_model(error)
        self._probe, self.has_probe = Batch((self._passed,)), True
        self._retries.appendleft(self._probe)

    def _end_probe(self) -> None:
        self._probe, self.has_probe, self._failed_in_a_row = None, False, 0


def _broken_model(error: BaseException | None) -> ModelError:
    """The model is at fault, and not the texts it failed on."""
    broken = ModelError(
        f"the model failed on {BROKEN_AFTER} chunks in a row, each alone, "
        f"the last time with: {type(error).__name__}: {error}"
    )
    broken.__cause__ = error
    return broken
