"""The engine: one scheduler feeds the encoders, and each client gets back what they make of its texts.

A job is a client and so are the requests of an app, also at the same time. What one does ends with it: stopped,
cancelled or full, it takes nothing of the others with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import anyio
import numpy as np

from asyncembed.encoders.base import Encoder, FloatMatrix, pads_rows
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.engine.limit_memory import LimitMemory
from asyncembed.engine.limits import LearntLimit
from asyncembed.engine.scheduler import EncoderState, LimitEstimator, Scheduler, priority_of
from asyncembed.engine.work import Client, Work
from asyncembed.errors import ModelError
from asyncembed.options import EmbedOptions
from asyncembed.records import Batch
from asyncembed.threads import WorkerThread

logger = logging.getLogger("asyncembed")


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

    def __init__(self, encoder: Encoder, memory: LimitMemory | None = None) -> None:
        self._encoder = encoder
        self._memory = memory if memory is not None and memory.is_kept else None
        self._under_way: deque[tuple[Batch, object, float]] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._fatal: Exception | None = None
        self._n_passed = 0
        self._ended = 0.0

    def advance(self, batch: Batch | None, learnt: LearntLimit | None = None) -> Outcome | None:
        """Starts `batch`, and finishes one under way if all slots are taken or there is nothing to start.

        That is the oldest of the most urgent: a device that runs several batches at once is soon done with a small
        urgent one, which must not wait for large ones that began before it. The oldest of all is passed by no more
        often than there are slots. `learnt` is what the limit's memory is told with the batch.
        """
        if batch is not None:
            self._begin(batch, learnt)
        if len(self._under_way) >= self._encoder.slots or (batch is None and self._under_way and not self._outcomes):
            self._finish_next()
        return self._outcomes.popleft() if self._outcomes else None

    def _begin(self, batch: Batch, learnt: LearntLimit | None) -> None:
        started, suspect, memory = time.perf_counter(), None, self._memory
        if self._fatal is not None:  # the device's context is dead: nothing it would give can be trusted
            self._outcomes.append(Outcome(batch, None, 0.0, FailureKind.FATAL, self._fatal))
            return
        try:
            if memory is not None and learnt is not None:
                # A chunk as large as a batch that a run was killed in runs alone, so that its note blames no other.
                suspect = memory.suspect(batch)
                while suspect is not None and self._under_way:
                    self._finish_next()
                memory.before(batch.padded_tokens, learnt, suspect)
            handle = self._encoder.start(batch)
        except Exception as error:
            failed = error
        else:
            self._under_way.append((batch, handle, started))
            if suspect is not None and memory is not None:
                self._finish_next()
                memory.survived(suspect)
            return
        self._fail(batch, failed, started)

    def _choose(self) -> int:
        """The place of the batch to finish."""
        if self._n_passed >= self._encoder.slots:
            return 0
        urgency = [priority_of(batch) for batch, _, _ in self._under_way]
        return urgency.index(min(urgency))

    def _finish_next(self) -> None:
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
            self._outcomes.append(Outcome(batch, vectors, self._end(started)))
            if self._memory is not None:
                self._memory.after(batch.padded_tokens)
            return
        del handle
        self._fail(batch, failed, started)

    def _fail(self, batch: Batch, error: Exception, started: float) -> None:
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
        if self._memory is not None:
            self._memory.after(batch.padded_tokens, error)
        self._outcomes.append(Outcome(batch, None, self._end(started), kind, error))

    def _end(self, started: float) -> float:
        """Seconds of a batch that ends now."""
        begun, self._ended = max(started, self._ended), time.perf_counter()
        return self._ended - begun


class EncoderThread:
    """One encoder with the thread that owns it, and the batches that are on their way to it and in it."""

    def __init__(
        self,
        encoder: Encoder,
        estimator: LimitEstimator,
        *,
        thread: WorkerThread,
        max_rows: int | None = None,
        memory: LimitMemory | None = None,
    ) -> None:
        self.encoder = encoder
        self.state = EncoderState(estimator, max_rows, pads=pads_rows(encoder))
        self.thread = thread
        self.wake = asyncio.Event()
        self._memory = memory
        self._runner = ModelRunner(encoder, memory)
        self._in_hand: dict[int, Batch] = {}  # without an outcome yet
        self._calls: deque[tuple[Batch, Future[Outcome | None]]] = deque()  # each begins one of these

    def __repr__(self) -> str:
        return f"<EncoderThread in_hand={self.n_in_hand} {self.state!r}>"

    @property
    def n_in_hand(self) -> int:
        """Batches that are on their way to the model or in it."""
        return len(self._in_hand)

    def holds(self, client: Client) -> bool:
        """Whether chunks of a client are in a batch in hand."""
        return any(chunk.work.client is client for batch in self._in_hand.values() for chunk in batch.chunks)

    def submit_more(self, scheduler: Scheduler) -> None:
        """Keeps all slots of the encoder busy, and where much waits one batch ready."""
        slots = self.encoder.slots
        while self.n_in_hand < slots + scheduler.may_choose_ahead(self.state):
            batch = scheduler.next_batch(self.state, slots - self.n_in_hand)
            if batch is None:
                return
            learnt = self._memory.estimator.learnt() if self._memory is not None else None
            call = self.thread.submit(self._runner.advance, batch, learnt)
            self._in_hand[id(batch)] = batch
            self._calls.append((batch, call))
            loop = asyncio.get_running_loop()
            call.add_done_callback(lambda _, loop=loop: _call_soon(loop, self.wake.set))  # type: ignore[misc]

    async def next_outcome(self) -> Outcome | None:
        """The next batch that ended; None if there is none to wait for, or something else has changed."""
        if self._calls and self._calls[0][1].done():
            outcome = self._calls.popleft()[1].result()
        elif not self._calls and self._in_hand:
            outcome = await self.thread.run(self._runner.advance, None)
        else:
            await self.wake.wait()
            self.wake.clear()
            return None
        if outcome is not None:
            del self._in_hand[id(outcome.batch)]
        return outcome

    def withdraw_unwanted(self) -> None:
        """Takes batches back that have not begun, if nobody waits for any of their chunks."""
        while self._calls:
            batch, call = self._calls[-1]
            is_wanted = batch is self.state.probe or any(chunk.work.is_wanted for chunk in batch.chunks)
            if is_wanted or not call.cancel():
                break
            self._calls.pop()
            del self._in_hand[id(batch)]
        self.wake.set()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop was closed while the last call ran: nobody is left to be woken
        loop.call_soon_threadsafe(callback)


@dataclass(slots=True)
class EngineStatistics:
    """Totals since the start; tokens include prompt and special tokens."""

    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    model_seconds: float = 0.0


class Engine:
    """One scheduler, the encoders that it feeds (at least one), and the clients whose texts these embed."""

    def __init__(self, *encoders: EncoderThread, is_interactive: bool = False) -> None:
        self.encoders = encoders
        self.scheduler = Scheduler(is_interactive=is_interactive)
        self.statistics = EngineStatistics()
        self._clients: WeakSet[Client] = WeakSet()  # each lives as long as its user keeps it
        self._closed = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Engine {self.scheduler!r} {self.encoders!r} {list(self._clients)!r}>"

    @property
    def encoder(self) -> Encoder:
        """The model."""
        return self.encoders[0].encoder

    @property
    def token_limit(self) -> int:
        """The limit of a batch in padded tokens."""
        return self.encoders[0].state.limit

    def add(self, client: Client) -> None:
        """One more whose texts come here; it fails at once if the engine has."""
        self._clients.add(client)
        if self._error is not None:
            client.fail(self._error)

    async def run(self) -> None:
        """Embeds what is pushed until closed and done.

        Raises:
            ModelError: The model or its device cannot go on.
        """
        try:
            if len(self.encoders) == 1:
                await self._drive(self.encoders[0])
                return
            async with anyio.create_task_group() as group:
                for encoder in self.encoders:
                    group.start_soon(self._drive, encoder)
        finally:
            self.scheduler.heap.clear()

    def close(self) -> None:
        """No more texts will come: `run` ends when all is done. Idempotent."""
        self._closed = True
        self.wake()

    def push(self, works: Sequence[Work]) -> None:
        """Enqueues the chunks of texts."""
        if works:
            self.scheduler.push(works)
            self.wake()

    def hasten(self, work: Work) -> None:
        """Puts a text's chunks into the next batch."""
        if self.scheduler.heap.hasten(work):
            self.wake()

    def drop(self, works: Sequence[Work]) -> None:
        """Drops texts of one client that nobody waits for any more."""
        self.scheduler.drop(works)
        self._withdraw_unwanted()

    def stop(self, client: Client) -> None:
        """Drops all of a client's texts but those in a batch in hand."""
        self.scheduler.stop(client)
        self._withdraw_unwanted()

    def holds(self, client: Client) -> bool:
        """Whether chunks of a client are in a batch in hand."""
        return any(encoder.holds(client) for encoder in self.encoders)

    def break_clients(self, error: Exception, *, but: Client | None = None) -> None:
        """The engine ends, while clients are still open: their own `run` raises this, all but one's."""
        self._error = error
        for client in list(self._clients):
            if client is not but:
                client.fail(error)

    def wake(self) -> None:
        """Re-evaluates what may run."""
        for encoder in self.encoders:
            encoder.wake.set()

    def _withdraw_unwanted(self) -> None:
        for encoder in self.encoders:
            encoder.withdraw_unwanted()

    def _is_done(self) -> bool:
        return self._closed and not self.scheduler and not any(encoder.n_in_hand for encoder in self.encoders)

    async def _drive(self, encoder: EncoderThread) -> None:
        """Keeps one encoder busy until all is done."""
        while True:
            encoder.submit_more(self.scheduler)
            if self._is_done():
                self.wake()  # those that drive the other encoders
                return
            outcome = await encoder.next_outcome()
            if outcome is not None:
                self._settle(encoder, outcome)

    def _settle(self, encoder: EncoderThread, outcome: Outcome) -> None:
        batch, totals = outcome.batch, self.statistics
        totals.model_seconds += outcome.seconds
        if outcome.vectors is not None:
            is_probe = batch is encoder.state.probe
            done = self.scheduler.succeeded(encoder.state, batch, outcome.vectors)
            if not is_probe:
                # A small batch is no sample of the speed of the size in use.
                encoder.state.estimator.succeed(batch.padded_tokens, None if batch.is_small else outcome.seconds)
                totals.batches += 1
                totals.row_tokens += batch.row_tokens
                totals.padded_tokens += batch.padded_tokens
        elif outcome.error is None or outcome.kind is None:
            raise AssertionError("a batch without vectors has an error: this is a bug")
        else:
            done = self.scheduler.failed(encoder.state, batch, outcome.kind, outcome.error)
            if outcome.kind is FailureKind.OUT_OF_MEMORY:
                totals.ooms += 1
                logger.info(
                    "out of memory at %d padded tokens; the limit is %d now", batch.padded_tokens, encoder.state.limit
                )
            if len(self.encoders) > 1:
                self.wake()  # what is tried again may run on any of them
        of_clients: dict[Client, list[Work]] = {chunk.work.client: [] for chunk in batch.chunks}
        for work in done:
            of_clients[work.client].append(work)
        for client, works in of_clients.items():
            client.settled(works)


class EngineHost(Protocol):
    """Who owns an engine that others may use as well."""

    @property
    def options(self) -> EmbedOptions:
        """What its model was loaded with."""
        ...

    async def engine(self) -> Engine:
        """The engine, when the model is loaded."""
        ...
