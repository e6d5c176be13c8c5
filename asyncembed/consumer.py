"""The consumer: keeps the one thread that owns the model busy, backs off when memory runs out, isolates poison."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Protocol

from asyncembed.encoders.base import Encoder, FloatMatrix
from asyncembed.encoders.failures import FailureKind
from asyncembed.errors import KilledBeforeError, ModelError
from asyncembed.heap import ChunkHeap
from asyncembed.records import Batch, Chunk
from asyncembed.runner import ModelRunner, Outcome
from asyncembed.threads import WorkerThread
from asyncembed.wording import plural

logger = logging.getLogger("asyncembed")

BROKEN_AFTER = 16
"""Chunks that fail alone, none passing between them, before it is asked whether the model is broken."""

FULL = 0.9
"""A prepared batch this full of useful tokens is not chosen anew when more chunks arrive."""

FULL_IF_SMALL = 0.5
"""The same of one that was cut for less than the limit: of rows alike in length one more would not fit."""


class LimitEstimator(Protocol):
    """What the consumer asks of a `TokenLimitEstimator` or its replacement."""

    def __call__(self) -> int:
        """The current limit of a batch in padded tokens."""
        ...

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """A batch of so many padded tokens ran; infinite seconds say nothing about the speed of the limit."""
        ...

    def fail(self, n_tokens: int) -> None:
        """A batch of so many padded tokens ran out of memory."""
        ...


def current_limit(estimator: LimitEstimator) -> int:
    """The limit in padded tokens, at least 1 whatever a replaced estimator says."""
    return max(1, int(estimator()))


@dataclass(slots=True)
class ConsumerStatistics:
    """Totals since the start; tokens include prompt and special tokens."""

    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    model_seconds: float = 0.0


class _Submitted(NamedTuple):
    """A batch given to the model's thread, and whether it is a part of one that failed."""

    batch: Batch
    future: Future[Outcome | None]
    is_retry: bool


class Consumer:
    """Feeds the model from the heap until it is closed and all is done.

    One batch more than the encoder has slots is kept ready, so that the model's thread never waits for the event
    loop; while that one has not begun it is taken back and chosen anew when more chunks arrive and it is not full, or
    they are more urgent than it is. A batch is the smaller where several slots are idle: they share what waits.
    """

    def __init__(
        self,
        encoder: Encoder,
        heap: ChunkHeap,
        estimator: LimitEstimator,
        *,
        max_rows: int | None,
        worker: WorkerThread,
        on_embedded: Callable[[Batch, FloatMatrix], None],
        on_failed: Callable[[Chunk, str], None],
        on_settled: Callable[[], None] = lambda: None,
        held: Callable[[], Collection[int]] = tuple,
        is_wanted: Callable[[Chunk], bool] = lambda _: True,
    ) -> None:
        self.statistics = ConsumerStatistics()
        self._encoder = encoder
        self._heap = heap
        self._estimator = estimator
        self._max_rows = max_rows
        self._worker = worker
        self._runner = ModelRunner(encoder)
        self._second_chance: set[Chunk] = set()
        self._on_embedded = on_embedded
        self._on_failed = on_failed
        self._on_settled = on_settled
        self._held = held
        self._is_wanted = is_wanted
        self._retries: deque[Batch] = deque()
        self._retry_waited = False
        self._under_way: dict[int, Batch] = {}
        self._submitted: deque[_Submitted] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._failed_in_a_row = 0
        self._passed: Chunk | None = None
        self._probe: Batch | None = None

    def __repr__(self) -> str:
        return (
            f"<Consumer submitted={len(self._submitted)} under_way={len(self._under_way)} "
            f"retries={len(self._retries)}{' closed' if self._closed else ''}>"
        )

    def notify(self) -> None:
        """Chunks have arrived in the heap."""
        if self._submitted:
            last = self._submitted[-1].batch
            is_spare = self._n_in_hand() > self._encoder.slots
            if (is_spare and not self._is_full(last)) or self._is_urgent_beside(last):
                self._withdraw()
        self._wake.set()

    def wake(self) -> None:
        """`held` may say otherwise now."""
        self._wake.set()

    def holds(self, is_theirs: Callable[[Chunk], bool]) -> bool:
        """Whether chunks of theirs are in a batch that was submitted or is under way."""
        batches = [*self._under_way.values(), *(item.batch for item in self._submitted)]
        return any(is_theirs(chunk) for batch in batches for chunk in batch.chunks)

    def drop_unwanted(self) -> None:
        """Some chunks are no longer wanted: take back batches with them that have not begun, and let these go."""
        if any(not self._is_wanted(chunk) for item in self._submitted for chunk in item.batch.chunks):
            self._withdraw()
        self._wake.set()

    def close(self) -> None:
        """No more chunks will come: `run` ends when all is done."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Consume until closed and done.

        Raises:
            ModelError: The device is dead, or the model fails on every chunk it is given.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._submit_more(loop)
            if not self._submitted:
                if not self._under_way and self._closed and not self._heap and not self._retries:
                    return
                if self._under_way:
                    outcome = await self._worker.run(self._runner.advance, None)
                    self._settle(outcome)
                    continue
            elif self._submitted[0].future.done():
                first = self._submitted.popleft()
                self._under_way[id(first.batch)] = first.batch
                self._settle(first.future.result())
                continue
            await self._wake.wait()
            self._wake.clear()

    def _submit_more(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._n_in_hand() <= self._encoder.slots:
            batch, is_retry = self._next_retry(), True
            if batch is None:
                batch, is_retry = self._next_new(), False
            if batch is None:
                return
            future = self._worker.submit(self._runner.advance, batch)
            self._submitted.append(_Submitted(batch, future, is_retry))
            future.add_done_callback(lambda _: _call_soon(loop, self._wake.set))

    def _n_in_hand(self) -> int:
        return len(self._under_way) + len(self._submitted)

    def _next_new(self) -> Batch | None:
        n_idle = self._encoder.slots - self._n_in_hand()
        share = max(1, -(-self._heap.n_tokens // n_idle)) if n_idle > 1 else None
        return self._heap.take(current_limit(self._estimator), self._max_rows, self._held(), share=share)

    def _next_retry(self) -> Batch | None:
        """The next part of a batch that failed; None if there is none, or something more urgent goes between two."""
        while self._retries:
            batch = self._wanted_of(self._retries[0])
            if batch is not None and self._is_urgent_beside(batch) and not self._retry_waited:
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

    def _is_urgent_beside(self, batch: Batch) -> bool:
        """Whether something waits that is more urgent than all in the batch."""
        urgent = self._heap.most_urgent(self._held())
        return urgent is not None and urgent < min(chunk.priority for chunk in batch.chunks)

    def _settle(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        try:
            self._settle_one(outcome)
        finally:
            self._on_settled()

    def _settle_one(self, outcome: Outcome) -> None:
        del self._under_way[id(outcome.batch)]
        batch, n_padded = outcome.batch, outcome.batch.padded_tokens
        self.statistics.model_seconds += outcome.seconds
        if batch is self._probe and outcome.kind is not FailureKind.FATAL:
            self._settle_probe(outcome)
            return
        if outcome.vectors is not None:
            self.statistics.batches += 1
            self.statistics.row_tokens += batch.row_tokens
            self.statistics.padded_tokens += n_padded
            self._failed_in_a_row, self._passed = 0, batch.chunks[0]
            # A small batch is no sample of the speed of the size in use.
            self._estimator.succeed(n_padded, inf if batch.is_small else outcome.seconds)
            if self._second_chance:
                self._second_chance.difference_update(batch.chunks)
            self._on_embedded(batch, outcome.vectors)
            return
        if outcome.error is None or outcome.kind is None:
            raise AssertionError("a batch without vectors has an error: this is a bug")
        # 1. The device is dead: stop. 2. Out of memory: a lower limit, and the batch in parts.
        # 3. Anything else may be one text's fault: find it by halving.
        if isinstance(outcome.error, ModelError):
            raise outcome.error
        if outcome.kind is FailureKind.FATAL:
            raise ModelError(f"the device cannot go on: {outcome.error}") from outcome.error
        if outcome.kind is FailureKind.OUT_OF_MEMORY:
            self.statistics.ooms += 1
            self._estimator.fail(n_padded)
            logger.info("out of memory at %d padded tokens; the limit is %d now", n_padded, self._estimator())
            self._withdraw()
        if len(batch.chunks) > 1:
            self._retries.extendleft(reversed(batch.halves()))
        else:
            self._fail_alone(batch.chunks[0], outcome.kind, outcome.error)

    def _fail_alone(self, chunk: Chunk, kind: FailureKind, error: BaseException) -> None:
        if kind is FailureKind.OUT_OF_MEMORY:
            # Once more, after what waits: memory that a neighbour or an earlier failure holds may be free by then.
            if chunk not in self._second_chance:
                self._second_chance.add(chunk)
                self._retries.append(Batch((chunk,)))
                return
            self._second_chance.discard(chunk)
            self._on_failed(chunk, f"a chunk of {plural(chunk.length, 'token')} does not fit into memory even alone")
            return
        if isinstance(error, KilledBeforeError):  # says nothing about the model
            self._on_failed(chunk, str(error))
            return
        self._on_failed(chunk, f"the model failed on it: {type(error).__name__}: {error}")
        self._failed_in_a_row += 1
        if self._failed_in_a_row < BROKEN_AFTER or self._probe is not None:
            return
        if self._passed is None:
            raise broken_model(error)
        # Bad texts may come in a row. Whether it is the model, one that it took before will tell.
        self._probe = Batch((self._passed,))
        self._retries.appendleft(self._probe)

    def _settle_probe(self, outcome: Outcome) -> None:
        self._probe, self._failed_in_a_row = None, 0
        if outcome.error is not None:
            raise broken_model(outcome.error)

    def _withdraw(self) -> None:
        """Take back batches that were kept ready and have not begun.

        Parts of a failed batch stay as they are: mixed with others, the search for the text at fault would begin anew.
        """
        while self._submitted and self._submitted[-1].future.cancel():
            last = self._submitted.pop()
            if last.is_retry:
                self._retries.appendleft(last.batch)
            elif (batch := self._wanted_of(last.batch)) is not None:
                self._heap.put_back(batch)

    def _is_full(self, batch: Batch) -> bool:
        rows_are_full = self._max_rows is not None and len(batch.chunks) >= self._max_rows
        part = FULL_IF_SMALL if batch.is_small else FULL
        return rows_are_full or batch.row_tokens >= part * (batch.limit or current_limit(self._estimator))


def broken_model(error: BaseException) -> ModelError:
    """The model is at fault, and not the texts it failed on."""
    broken = ModelError(
        f"the model failed on {BROKEN_AFTER} chunks in a row, each alone, "
        f"the last time with: {type(error).__name__}: {error}"
    )
    broken.__cause__ = error
    return broken


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop was closed while the last call ran: nobody is left to be woken
        loop.call_soon_threadsafe(callback)
