"""The engine: one model, the heap that feeds it, and a lane for each of those who share it.

It is handed texts with a sink each, and hands every sink what became of its text, exactly once. Who makes the
texts and what is done with the vectors is not its business: a job and an app use it alike, also at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import count
from typing import NamedTuple, Protocol

from asyncembed.assembly import Assembler
from asyncembed.consumer import Consumer, ConsumerStatistics
from asyncembed.encoders.base import Encoder, FloatMatrix
from asyncembed.heap import ChunkHeap, HeapStatistics
from asyncembed.lane import BULK, ChunkLongText, ChunkTexts, Lane
from asyncembed.options import EmbedOptions
from asyncembed.records import Batch, Chunk, lane_of
from asyncembed.scheduler import LimitEstimator, current_limit
from asyncembed.threads import WorkerThread


class EngineStatistics(NamedTuple):
    """What the engine did, and what waits in it."""

    consumer: ConsumerStatistics
    heap: HeapStatistics
    n_open: int
    token_limit: int


class Engine:
    """One model at work."""

    def __init__(
        self, encoder: Encoder, estimator: LimitEstimator, *, model_thread: WorkerThread, max_rows: int | None = None
    ) -> None:
        self.encoder = encoder
        self._estimator = estimator
        self._heap = ChunkHeap(prompt_below=BULK)
        self._lanes: dict[int, Lane] = {}
        self._numbers = count()
        self._ended: Exception | None = None
        self._consumer = Consumer(
            encoder,
            self._heap,
            estimator,
            max_rows=max_rows,
            worker=model_thread,
            on_embedded=self._embedded,
            on_failed=self._failed,
            on_settled=self._settled,
            held=self._held,
            is_wanted=self._is_wanted,
        )

    def __repr__(self) -> str:
        return f"<Engine {list(self._lanes.values())!r} {self._heap!r} {self._consumer!r}>"

    def statistics(self) -> EngineStatistics:
        """What was done and what waits, of all lanes."""
        n_open = sum(map(len, self._lanes.values()))
        return EngineStatistics(
            self._consumer.statistics, self._heap.statistics(), n_open, current_limit(self._estimator)
        )

    def open_lane(
        self,
        chunk: ChunkTexts,
        assembler: Assembler,
        *,
        may_compute: Callable[[], bool] = lambda: True,
        chunk_long: ChunkLongText | None = None,
    ) -> Lane:
        """A way in for one user of the engine, who has to `run` it."""
        number = next(self._numbers)
        self._lanes[number] = lane = Lane(
            number,
            self._heap,
            self._consumer,
            self._estimator,
            chunk,
            assembler,
            may_compute=may_compute,
            on_ended=self._forget,
            chunk_long=chunk_long,
        )
        if self._ended is not None:
            lane.fail(self._ended)
        return lane

    def close(self) -> None:
        """No more texts will come: `run` ends when all is done. Idempotent."""
        self._consumer.close()

    def break_lanes(self, error: Exception, *, but: Lane | None = None) -> None:
        """The engine ends, while lanes are still open: their own `run` raises this, all but one's."""
        self._ended = error
        for lane in self._lanes.values():
            if lane is not but:
                lane.fail(error)

    async def run(self) -> None:
        """Work until closed and done.

        Raises:
            ModelError: The model or its device cannot go on.
        """
        try:
            await self._consumer.run()
        finally:
            self._heap.clear()

    def _forget(self, lane: Lane) -> None:
        self._lanes.pop(lane.number, None)

    def _held(self) -> Collection[int]:
        return [number for number, lane in self._lanes.items() if not lane.may_compute()]

    def _is_wanted(self, chunk: Chunk) -> bool:
        lane = self._lanes.get(lane_of(chunk.owner))
        return lane is not None and lane.is_wanted(chunk.owner)

    def _embedded(self, batch: Batch, vectors: FloatMatrix) -> None:
        rows: dict[int, list[int]] = {}
        for row, chunk in enumerate(batch.chunks):
            rows.setdefault(lane_of(chunk.owner), []).append(row)
        for number, mine in rows.items():
            lane = self._lanes.get(number)
            if lane is None:
                continue  # it ended while this batch was under way
            if len(rows) == 1:
                lane.embedded(batch.chunks, vectors)
            else:
                lane.embedded([batch.chunks[row] for row in mine], vectors[mine])

    def _failed(self, chunk: Chunk, reason: str) -> None:
        lane = self._lanes.get(lane_of(chunk.owner))
        if lane is not None:
            lane.failed(chunk, reason)

    def _settled(self) -> None:
        for lane in self._lanes.values():
            lane.wake_if_ending()


class EngineHost(Protocol):
    """Who owns an engine that others may use as well."""

    @property
    def options(self) -> EmbedOptions:
        """What its model was loaded with."""
        ...

    async def engine(self) -> Engine:
        """The engine, when the model is loaded.

        Raises:
            ClosedError: It has ended, or was never opened.
        """
        ...
