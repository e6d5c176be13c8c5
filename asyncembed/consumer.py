"""The consumer and the work of the model's thread, which it keeps busy; it backs off when memory runs out."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asyncembed.encoders.base import Encoder, FloatMatrix
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.errors import ModelError
from asyncembed.heap import ChunkHeap
from asyncembed.records import Batch, Chunk
from asyncembed.scheduler import LimitEstimator, Scheduler
from asyncembed.threads import WorkerThread


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a batch in the model's thread.

    Attributes:
        batch: The batch.
        vectors: Shape `(rows, dim)` float32; None if it failed.
        seconds: From the end of the batch before it, or from its own start if the model was idle then, to its end.
            Of batches that overlap the sum over all is the time that the model was busy.
        kind: What kind of failure it was.
        error: The failure.
    """

    batch: Batch
    vectors: FloatMatrix | None
    seconds: float
    kind: FailureKind | None = None
    error: BaseException | None = None


class ModelRunner:
    """The work of the model's thread: batches in, outcomes out, as many under way as the encoder has slots."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._under_way: deque[tuple[Batch, object, float]] = deque()
        self._fatal: Exception | None = None
        self._n_passed = 0
        self._ended = 0.0

    def advance(self, batch: Batch | None) -> Outcome | None:
        """Start `batch`, and finish one under way if all slots are taken or there is nothing to start.

        That is the oldest of the most urgent: a device that runs several batches at once is soon done with a small
        urgent one, which must not wait for large ones that began before it. The oldest of all is passed by no more
        often than there are slots.
        """
        if batch is not None:
            started = time.perf_counter()
            if self._fatal is not None:  # the device's context is dead: nothing it would give can be trusted
                return Outcome(batch, None, 0.0, FailureKind.FATAL, self._fatal)
            try:
                handle = self._encoder.start(batch)
            except Exception as error:
                failed = error
            else:
                self._under_way.append((batch, handle, started))
                if len(self._under_way) < self._encoder.slots:
                    return None
                return self._finish_next()
            return self._failure(batch, failed, started)
        return self._finish_next() if self._under_way else None

    def _choose(self) -> int:
        """The place of the batch to finish."""
        if self._n_passed >= self._encoder.slots:
            return 0
        urgency = [min(chunk.priority for chunk in batch.chunks) for batch, _, _ in self._under_way]
        return urgency.index(min(urgency))

    def _finish_next(self) -> Outcome:
        place = self._choose()
        self._n_passed = self._n_passed + 1 if place else 0
        batch, handle, started = self._under_way[place]
        del self._under_way[place]
        try:
            vectors = np.asarray(self._encoder.finish(handle), np.float32)
            if vectors.shape[:1] != (len(batch.chunks),) or vectors.ndim != 2:
                raise ModelError(f"the encoder returned shape {vectors.shape} for {len(batch.chunks)} rows")
        except Exception as error:
            failed = error
        else:
            return Outcome(batch, vectors, self._end(started))
        del handle
        return self._failure(batch, failed, started)

    def _failure(self, batch: Batch, error: Exception, started: float) -> Outcome:
        """Called outside the `except` block, whose traceback would keep the batch's tensors alive."""
        kind = FailureKind.FATAL if isinstance(error, ModelError) else classify(error)
        if kind is FailureKind.FATAL:
            self._fatal = error
        if kind is FailureKind.OUT_OF_MEMORY:
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = error.__context__ = error.__cause__ = None
            try:
                self._encoder.free_memory()
            except Exception as failed:  # the device may be beyond help: what it says then counts
                if classify(failed) is FailureKind.FATAL:
                    self._fatal, kind, error = failed, FailureKind.FATAL, failed
        return Outcome(batch, None, self._end(started), kind, error)

    def _end(self, started: float) -> float:
        """Seconds of a batch that ends now."""
        begun, self._ended = max(started, self._ended), time.perf_counter()
        return self._ended - begun


logger = logging.getLogger("asyncembed")


@dataclass(slots=True)
class ConsumerStatistics:
    """Totals since the start; tokens include prompt and special tokens."""

    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    model_seconds: float = 0.0


class _Submitted(NamedTuple):
    """A batch given to the model's thread."""

    batch: Batch
    future: Future[Outcome | None]


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
        self._scheduler = Scheduler(heap, estimator, max_rows=max_rows, is_wanted=is_wanted)
        self._estimator = estimator
        self._worker = worker
        self._runner = ModelRunner(encoder)
        self._on_embedded = on_embedded
        self._on_failed = on_failed
        self._on_settled = on_settled
        self._held = held
        self._is_wanted = is_wanted
        self._under_way: dict[int, Batch] = {}
        self._submitted: deque[_Submitted] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"<Consumer submitted={len(self._submitted)} under_way={len(self._under_way)} "
            f"{self._scheduler!r}{' closed' if self._closed else ''}>"
        )

    def notify(self) -> None:
        """Chunks have arrived in the heap."""
        if self._submitted:
            last = self._submitted[-1].batch
            is_spare = self._n_in_hand() > self._encoder.slots
            if (is_spare and not self._scheduler.is_full(last)) or self._scheduler.is_urgent_beside(last, self._held()):
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
                if not self._under_way and self._closed and not self._scheduler:
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
            n_idle = self._encoder.slots - self._n_in_hand()
            batch = self._scheduler.next_batch(self._held(), n_idle)
            if batch is None:
                return
            future = self._worker.submit(self._runner.advance, batch)
            self._submitted.append(_Submitted(batch, future))
            future.add_done_callback(lambda _: _call_soon(loop, self._wake.set))

    def _n_in_hand(self) -> int:
        return len(self._under_way) + len(self._submitted)

    def _settle(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        try:
            self._settle_one(outcome)
        finally:
            self._on_settled()

    def _settle_one(self, outcome: Outcome) -> None:
        del self._under_way[id(outcome.batch)]
        batch = outcome.batch
        self.statistics.model_seconds += outcome.seconds
        if outcome.vectors is not None:
            if self._scheduler.succeeded(batch):
                # A small batch is no sample of the speed of the size in use.
                self._estimator.succeed(batch.padded_tokens, None if batch.is_small else outcome.seconds)
                self.statistics.batches += 1
                self.statistics.row_tokens += batch.row_tokens
                self.statistics.padded_tokens += batch.padded_tokens
                self._on_embedded(batch, outcome.vectors)
            return
        if outcome.error is None or outcome.kind is None:
            raise AssertionError("a batch without vectors has an error: this is a bug")
        given_up = self._scheduler.failed(batch, outcome.kind, outcome.error)
        if outcome.kind is FailureKind.OUT_OF_MEMORY:
            self.statistics.ooms += 1
            logger.info(
                "out of memory at %d padded tokens; the limit is %d now", batch.padded_tokens, self._estimator()
            )
            self._withdraw()
        if given_up is not None:
            self._on_failed(*given_up)

    def _withdraw(self) -> None:
        """Take back batches that were kept ready and have not begun."""
        while self._submitted and self._submitted[-1].future.cancel():
            self._scheduler.put_back(self._submitted.pop().batch)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop was closed while the last call ran: nobody is left to be woken
        loop.call_soon_threadsafe(callback)
