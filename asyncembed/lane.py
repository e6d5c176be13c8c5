"""A lane: one user's own way into a shared engine, with its chunking, its averages and its texts.

A job has a lane and so have an app's requests. What a lane does ends with it: stopped, cancelled or full, it takes
nothing of the others with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import NamedTuple

import anyio

from asyncembed.assembly import Assembled, Assembler
from asyncembed.chunking import ChunkedText, chunk_backing_off
from asyncembed.consumer import Consumer
from asyncembed.encoders import Instruction
from asyncembed.encoders.base import FloatMatrix
from asyncembed.errors import ClosedError
from asyncembed.heap import ChunkHeap
from asyncembed.records import OWNERS_PER_LANE, AnyText, Chunk, lane_of
from asyncembed.scheduler import LimitEstimator, current_limit
from asyncembed.threads import WorkerThread

Sink = Callable[[Assembled], None]


class Submission(NamedTuple):
    """A text for the engine.

    Attributes:
        owner: Its number, from `Lane.new_owner`.
        text: The text, or its token ids where the lane chunks those.
        sink: Called on the event loop with what became of it.
        priority: Class of urgency; lower is sooner.
        instruction: What the model is told with it, where the lane takes texts with different ones.
    """

    owner: int
    text: AnyText
    sink: Sink
    priority: int = 0
    instruction: Instruction = Instruction()


class Intake:
    """Submissions by urgency, and within a class in the order they came."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[int, Submission]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, item: Submission) -> None:
        """Let it wait."""
        self._waiting.setdefault(item.priority, {})[item.owner] = item

    def leave(self, item: Submission) -> bool:
        """Let it wait no longer; False if it did not."""
        waiting = self._waiting.get(item.priority, {})
        was_there = waiting.pop(item.owner, None) is not None
        if was_there and not waiting:
            del self._waiting[item.priority]
        return was_there

    def take(self, n_texts: int, n_chars: int) -> list[Submission]:
        """The most urgent, no more than one call of the tokenizer takes; at least one, however long, if any waits."""
        taken: list[Submission] = []
        for priority in sorted(self._waiting):
            for item in self._waiting[priority].values():
                n_chars -= len(item.text)
                if taken and (len(taken) >= n_texts or n_chars < 0):
                    break
                taken.append(item)
            else:
                continue
            break
        for item in taken:
            self.leave(item)
        return taken

    def clear(self) -> None:
        """Drop all."""
        self._waiting.clear()


WINDOW_BATCHES = 32
"""Depth of a lane's window: see `heap` for what it buys. At 16,384 tokens a batch it is 2 MB of ids."""

WINDOW_CHUNKS = 20_000
"""Most chunks in the window, so that a choice stays under a millisecond."""

CALL_TEXTS = 256
CALL_CHARS = 1 << 15
"""Most texts and characters of one call of the tokenizer, some 25 ms of work: what is more urgent goes between two
calls."""

INTERACTIVE = 0
BULK = 10
"""Classes of urgency: somebody waits for it, or a job that is in no hurry."""

ChunkTexts = Callable[[Sequence[Submission]], Sequence[ChunkedText]]

ChunkLongText = Callable[[Submission, Callable[[], bool]], ChunkedText]
"""One text into chunks, and whether somebody still waits for it, to be asked now and then."""


@dataclass(slots=True)
class ChunkingStatistics:
    """Totals since the start; tokens without prompt and special tokens."""

    dropped_tokens: int = 0
    truncated_texts: int = 0
    unknown_tokens: int = 0


def window_tokens(estimator: LimitEstimator) -> int:
    """Tokens that may wait in a lane's window before no more texts are chunked."""
    return WINDOW_BATCHES * current_limit(estimator)


class Lane:
    """Opened by `Engine.open_lane`; `run` works until it is closed and done."""

    def __init__(
        self,
        number: int,
        heap: ChunkHeap,
        consumer: Consumer,
        estimator: LimitEstimator,
        chunk: ChunkTexts,
        assembler: Assembler,
        *,
        may_compute: Callable[[], bool],
        on_ended: Callable[[Lane], None],
        chunk_long: ChunkLongText | None = None,
    ) -> None:
        self.number = number
        self.may_compute = may_compute
        self.chunking = ChunkingStatistics()
        self._heap = heap
        self._consumer = consumer
        self._estimator = estimator
        self._chunk = chunk
        self._on_ended = on_ended
        self._owners = count(number * OWNERS_PER_LANE)
        self._assembler = assembler
        self._thread = WorkerThread("asyncembed-tokenizer")
        self._chunk_long = chunk_long
        self._long_thread = WorkerThread("asyncembed-long-texts")
        self._intake, self._long_intake = Intake(), Intake()
        self._open: dict[int, Submission] = {}
        self._changed, self._long_changed = asyncio.Event(), asyncio.Event()
        self._room = asyncio.Event()
        self._error: Exception | None = None
        self._closed = False
        self._stopped = False

    def __repr__(self) -> str:
        state = " stopped" if self._stopped else " closed" if self._closed else ""
        return f"<Lane {self.number} open={len(self._open)}{state}>"

    def __len__(self) -> int:
        """Texts handed over that have not reached their sinks."""
        return len(self._open)

    def new_owner(self) -> int:
        """A number for a text, unique within the engine."""
        return next(self._owners)

    async def submit(self, submissions: Sequence[Submission]) -> None:
        """Hand texts over; waits while the window of chunks is full.

        Cancelled while waiting, none of them was taken.

        Raises:
            ClosedError: The lane has ended; why is told by `run`.
        """
        while not self._closed and (self._intake or self._is_full()):
            self._room.clear()
            await self._room.wait()
        self.submit_nowait(submissions)

    def submit_nowait(self, submissions: Sequence[Submission]) -> None:
        """Hand texts over, however many wait.

        Raises:
            ClosedError: The lane has ended; why is told by `run`.
        """
        if self._closed:
            raise ClosedError("the engine takes no more texts: it has ended")
        for item in submissions:
            self._open[item.owner] = item
            self._intake_of(item).add(item)
        self._changed.set()
        self._long_changed.set()

    def close(self) -> None:
        """No more texts will come: `run` ends when all were given to their sinks. Idempotent."""
        self._closed = True
        self._wake()

    def stop(self) -> None:
        """Finish the batch in hand and end `run`; texts that are not done then never reach their sinks."""
        self._closed = self._stopped = True
        self._intake.clear()
        self._long_intake.clear()
        self._heap.discard_lane(self.number)
        self._consumer.drop_unwanted()
        self._wake()

    def fail(self, error: Exception) -> None:
        """The engine has ended: `run` raises this."""
        self._error = error
        self.stop()

    def hasten(self, owner: int) -> None:
        """Put a text's chunks into the next batch."""
        if self._heap.hasten(owner):
            self._consumer.notify()

    def raise_priority(self, owner: int, priority: int) -> None:
        """Make a text more urgent than it was, wherever it waits."""
        item = self._open.get(owner)
        if item is None or item.priority <= priority:
            return
        moved = self._open[owner] = item._replace(priority=priority)
        if self._intake_of(item).leave(item):
            self._intake_of(item).add(moved)
        elif self._heap.reprioritise(owner, priority):
            self._consumer.notify()

    def discard(self, owners: Iterable[int]) -> None:
        """Nobody waits for these texts any more: drop them wherever they are, before they cost anything."""
        chunked: list[int] = []
        for owner in owners:
            item = self._open.pop(owner, None)
            if item is not None and not self._intake_of(item).leave(item):
                self._assembler.discard(owner)
                chunked.append(owner)
        if chunked:  # once for all: each time costs a pass over the window
            self._heap.discard_many(chunked)
            self._consumer.drop_unwanted()
        self._wake()

    def resume(self) -> None:
        """`may_compute` may say otherwise now."""
        self._consumer.wake()

    def is_wanted(self, owner: int) -> bool:
        """Whether somebody still waits for the text."""
        return not self._stopped and owner in self._open

    def wake_if_ending(self) -> None:
        """A batch has ended: the last one in hand may have been it."""
        if self._stopped:
            self._changed.set()

    async def run(self) -> None:
        """Work until closed and done, or stopped.

        Raises:
            Exception: What `fail` was given: the engine has ended.
        """
        try:
            async with anyio.create_task_group() as group:
                if self._chunk_long is not None:
                    group.start_soon(self._chunk_long_texts, self._chunk_long)
                await self._work()
                group.cancel_scope.cancel()
            if self._error is not None:
                raise self._error
        finally:
            self._closed = True
            self._open.clear()
            self._intake.clear()
            self._long_intake.clear()
            self._assembler.clear()
            self._heap.discard_lane(self.number)
            self._consumer.drop_unwanted()
            self._on_ended(self)
            self._wake()
            try:
                await self._thread.aclose()
            finally:
                await self._long_thread.aclose()

    async def _work(self) -> None:
        """Chunk what comes until it is over; an error is left for `run`, not in a group of its own."""
        try:
            while self._error is None:
                if self._intake:
                    await self._chunk_some()
                    continue
                if self._closed and not self._stopped:
                    self._heap.drain(self.number)
                if self._is_over():
                    return
                self._changed.clear()
                await self._changed.wait()
        except Exception as error:
            self._error = error

    def embedded(self, chunks: Sequence[Chunk], vectors: FloatMatrix) -> None:
        """Vectors of this lane's chunks have come: shape `(len(chunks), dim)`."""
        for done in self._assembler.add(chunks, vectors):
            self._hand_over(done)
        self._room.set()

    def failed(self, chunk: Chunk, reason: str) -> None:
        """One of this lane's chunks failed."""
        done = self._assembler.fail(chunk.owner, reason)
        if done is not None:
            self._hand_over(done)
        self._room.set()

    def _is_over(self) -> bool:
        if self._stopped:
            return not self._consumer.holds(lambda chunk: lane_of(chunk.owner) == self.number)
        return self._closed and not self._open

    def _is_full(self) -> bool:
        n_chunks, n_tokens = self._heap.lane_statistics(self.number)
        return n_chunks >= WINDOW_CHUNKS or n_tokens >= window_tokens(self._estimator)

    def _intake_of(self, item: Submission) -> Intake:
        is_long = self._chunk_long is not None and isinstance(item.text, str) and len(item.text) > CALL_CHARS
        return self._long_intake if is_long else self._intake

    async def _chunk_some(self) -> None:
        submissions = self._intake.take(CALL_TEXTS, CALL_CHARS)
        self._take_in(submissions, await self._thread.run(chunk_backing_off, self._chunk, submissions))

    async def _chunk_long_texts(self, chunk: ChunkLongText) -> None:
        """Chunk long texts, one after the other, beside all others."""

        def chunk_one(items: Sequence[Submission]) -> list[ChunkedText]:
            return [chunk(item, partial(self.is_wanted, item.owner)) for item in items]

        try:
            while True:
                self._long_changed.clear()
                while taken := self._long_intake.take(1, 0):
                    self._take_in(taken, await self._long_thread.run(chunk_backing_off, chunk_one, taken))
                await self._long_changed.wait()
        except Exception as error:
            self.fail(error)

    def _take_in(self, submissions: Sequence[Submission], results: Sequence[ChunkedText]) -> None:
        for item, result in zip(submissions, results, strict=True):
            current = self._open.get(item.owner)
            if current is None or self._stopped:
                continue  # discarded meanwhile
            self.chunking.unknown_tokens += result.unknown_tokens
            if result.error is not None:
                self._hand_over(Assembled(item.owner, None, error=result.error))
                continue
            self.chunking.dropped_tokens += result.dropped_tokens
            self.chunking.truncated_texts += result.dropped_tokens > 0
            self._assembler.expect(item.owner, len(result.chunks))
            chunks = result.chunks
            if current.priority != item.priority:
                chunks = tuple(replace(chunk, priority=current.priority) for chunk in chunks)
            self._heap.push(chunks)
        self._consumer.notify()
        self._room.set()

    def _hand_over(self, done: Assembled) -> None:
        if done.error is not None:
            self._heap.discard(done.owner)
        item = self._open.pop(done.owner, None)
        if item is not None:  # the answer before it, of the same batch, may have ended the request that wanted it
            item.sink(done)
        if self._closed:
            self._changed.set()

    def _wake(self) -> None:
        self._changed.set()
        self._room.set()
