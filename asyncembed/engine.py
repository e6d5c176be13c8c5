"""The engine: wires chunking, heap, consumer and assembly in one task group.

It is handed texts with a sink each, and hands every sink what became of its text, exactly once. Who makes the
texts and what is done with the vectors is not its business: a job and an app use it alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from asyncembed.assembly import Assembled, Assembler
from asyncembed.chunking import Chunker
from asyncembed.consumer import Consumer, ConsumerStatistics, LimitEstimator, current_limit
from asyncembed.encoders.base import Encoder, FloatMatrix
from asyncembed.errors import ClosedError
from asyncembed.heap import ChunkHeap, HeapStatistics
from asyncembed.records import Batch, Chunk
from asyncembed.threads import WorkerThread

WINDOW_BATCHES = 32
"""Depth of the heap's window: see `heap` for what it buys. At 16,384 tokens a batch it is 2 MB of ids."""

WINDOW_CHUNKS = 20_000
"""Most chunks in the window, so that a choice stays under a millisecond."""

Sink = Callable[[Assembled], None]


@dataclass(slots=True)
class ChunkingStatistics:
    """Totals since the start; tokens without prompt and special tokens."""

    dropped_tokens: int = 0
    unknown_tokens: int = 0


class EngineStatistics(NamedTuple):
    """What the engine did, and what waits in it."""

    chunking: ChunkingStatistics
    consumer: ConsumerStatistics
    heap: HeapStatistics
    n_open: int
    token_limit: int


def window_tokens(estimator: LimitEstimator) -> int:
    """Tokens that may wait in the window before no more texts are chunked."""
    return WINDOW_BATCHES * current_limit(estimator)


class Submission(NamedTuple):
    """A text for the engine.

    Attributes:
        owner: Its number, from `Engine.new_owner`.
        text: The text.
        sink: Called on the event loop with what became of it.
        priority: Class of urgency; lower is sooner.
    """

    owner: int
    text: str
    sink: Sink
    priority: int = 0


class Engine:
    """One model at work.

    Args:
        encoder: The model.
        chunker: Makes chunks; used only in the engine's tokenizer thread.
        estimator: The limit of a batch in padded tokens.
        assembler: Puts vectors together.
        model_thread: The thread that owns the model; closed by its owner, not by the engine.
        max_rows: Most rows of a batch.
        may_compute: Asked before each batch; False holds it back until `resume`.
    """

    def __init__(
        self,
        encoder: Encoder,
        chunker: Chunker,
        estimator: LimitEstimator,
        assembler: Assembler,
        *,
        model_thread: WorkerThread,
        max_rows: int | None = None,
        may_compute: Callable[[], bool] = lambda: True,
    ) -> None:
        self._chunker = chunker
        self._estimator = estimator
        self._assembler = assembler
        self._heap = ChunkHeap()
        self._consumer = Consumer(
            encoder,
            self._heap,
            estimator,
            max_rows=max_rows,
            worker=model_thread,
            on_embedded=self._embedded,
            on_failed=self._failed,
            may_submit=may_compute,
        )
        self._tokenizer_thread = WorkerThread("asyncembed-tokenizer")
        self._send, self._receive = anyio.create_memory_object_stream[Sequence[Submission]](0)
        self._sinks: dict[int, Sink] = {}
        self._owners = count()
        self._room = asyncio.Event()
        self._chunking = ChunkingStatistics()
        self._scope = anyio.CancelScope()

    def __repr__(self) -> str:
        return f"<Engine open={len(self._sinks)} {self._heap!r} {self._consumer!r}>"

    def statistics(self) -> EngineStatistics:
        """What was done and what waits."""
        limit = current_limit(self._estimator)
        return EngineStatistics(
            self._chunking, self._consumer.statistics, self._heap.statistics(), len(self._sinks), limit
        )

    def new_owner(self) -> int:
        """A number for a text, unique within this engine."""
        return next(self._owners)

    async def submit(self, submissions: Sequence[Submission]) -> None:
        """Hand texts over; waits while the window of chunks is full.

        Cancelled while waiting, none of them was taken.

        Raises:
            ClosedError: The engine has ended; why is told by `run`.
        """
        try:
            await self._send.send(submissions)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise ClosedError("the engine takes no more texts: it has ended") from None

    def close(self) -> None:
        """No more texts will come: `run` ends when all were given to their sinks. Idempotent."""
        self._send.close()

    def hasten(self, owner: int) -> None:
        """Put a text's chunks into the next batch."""
        if self._heap.hasten(owner):
            self._consumer.notify()

    def resume(self) -> None:
        """`may_compute` may say otherwise now."""
        self._consumer.wake()

    def stop(self) -> None:
        """Finish the batch in hand and end `run`; texts that are not done then never reach their sinks."""
        self._scope.cancel()
        self._consumer.drop_waiting()
        self._consumer.close()

    async def run(self) -> None:
        """Work until closed and done, or stopped.

        Raises:
            ModelError: The model or its device cannot go on.
        """
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._chunk_all, self._receive)
                await self._consumer.run()
        finally:
            self._sinks.clear()
            self._assembler.clear()
            self._heap.clear()
            self._send.close()
            self._receive.close()
            await self._tokenizer_thread.aclose()

    async def _chunk_all(self, receive: MemoryObjectReceiveStream[Sequence[Submission]]) -> None:
        with self._scope:
            async for submissions in receive:
                await self._wait_for_room()
                texts = [(item.owner, item.text, item.priority) for item in submissions]
                results = await self._tokenizer_thread.run(self._chunker.chunk, texts)
                if self._scope.cancel_called:  # a call that had ended already is not interrupted
                    break
                for item, result in zip(submissions, results, strict=True):
                    self._chunking.unknown_tokens += result.unknown_tokens
                    if result.error is not None:
                        item.sink(Assembled(item.owner, None, error=result.error))
                        continue
                    self._chunking.dropped_tokens += result.dropped_tokens
                    self._sinks[item.owner] = item.sink
                    self._assembler.expect(item.owner, len(result.chunks))
                    self._heap.push(result.chunks)
                self._consumer.notify()
        self._consumer.close()

    async def _wait_for_room(self) -> None:
        while len(self._heap) >= WINDOW_CHUNKS or self._heap.n_tokens >= window_tokens(self._estimator):
            self._room.clear()
            await self._room.wait()

    def _embedded(self, batch: Batch, vectors: FloatMatrix) -> None:
        for done in self._assembler.add(batch.chunks, vectors):
            self._hand_over(done)
        self._room.set()

    def _failed(self, chunk: Chunk, reason: str) -> None:
        done = self._assembler.fail(chunk.owner, reason)
        if done is not None:
            self._hand_over(done)
        self._room.set()

    def _hand_over(self, done: Assembled) -> None:
        if done.error is not None:
            self._heap.discard(done.owner)
        self._sinks.pop(done.owner)(done)
