"""The last stage: save what is finished in micro-batches, count it, put it in order, and deliver it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncembed.assembly import Assembled
from asyncembed.errors import TextsFailedError
from asyncembed.job.lookup import Pending
from asyncembed.options import OnError
from asyncembed.records import EmbeddedText, Summary
from asyncembed.sinks import JsonStore

T = TypeVar("T")


class OrderBuffer(Generic[T]):
    """Holds what came early until all before it has come."""

    def __init__(self) -> None:
        self._held: dict[int, T] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"<OrderBuffer next={self._next} held={len(self._held)}>"

    @property
    def next_index(self) -> int:
        """The position that all others wait for."""
        return self._next

    def push(self, items: Sequence[tuple[int, T]]) -> list[T]:
        """Add items with their positions; those whose turn has come, in order."""
        for index, item in items:
            if index < self._next or index in self._held:
                raise AssertionError(f"position {index} came twice: this is a bug")
            self._held[index] = item
        ready: list[T] = []
        while self._next in self._held:
            ready.append(self._held.pop(self._next))
            self._next += 1
        return ready

    def rest(self) -> list[T]:
        """All that is still held, in order, gaps skipped: no more will come."""
        held, self._held = self._held, {}
        return [held[index] for index in sorted(held)]


COMMIT_RECORDS = 256
"""Most records of one commit, which is one hop to the store's thread."""

KEPT_FAILURES = 1000
"""Failed records kept in memory; all are in `errors.jsonl`."""

Delivered = tuple[Pending, EmbeddedText]


class Delivery:
    """Saves and delivers results."""

    def __init__(
        self,
        store: JsonStore | None,
        summary: Summary,
        *,
        ordered: bool,
        on_error: OnError,
        deliver: Callable[[Pending, EmbeddedText], None],
        settled: Callable[[Sequence[Pending]], None],
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        self.failures: list[EmbeddedText] = []
        self._store = store
        self._summary = summary
        self._order: OrderBuffer[Delivered] | None = OrderBuffer() if ordered else None
        self._on_error = on_error
        self._deliver = deliver
        self._settled = settled
        self._on_progress = on_progress
        send, receive = anyio.create_memory_object_stream[Pending](float("inf"))
        self._n_unsaved = 0
        self._send: MemoryObjectSendStream[Pending] = send
        self._receive: MemoryObjectReceiveStream[Pending] = receive

    @property
    def head(self) -> int | None:
        """The position in the input that ordered delivery waits for; None if unordered."""
        return self._order.next_index if self._order is not None else None

    @property
    def has_room(self) -> bool:
        """Whether less than a commit's worth of computed texts waits to be saved: a crash would lose no more."""
        return self._n_unsaved < COMMIT_RECORDS

    def put(self, pending: Pending) -> None:
        """A text has its result."""
        self._n_unsaved += isinstance(pending.result, Assembled)
        self._send.send_nowait(pending)

    def close(self) -> None:
        """No more results will come: `run` ends when all are delivered. Idempotent."""
        self._send.close()

    async def run(self) -> None:
        """Save and deliver to the end.

        Raises:
            StoreError: The disk does not take it.
            AsyncEmbedError: A text failed and `on_error` is `raise`.
        """
        async for first in self._receive:
            await self._save([first, *self._waiting(COMMIT_RECORDS - 1)])
        if self._order is not None:  # of a run that was stopped, results are left whose turn never came
            for pending, record in self._order.rest():
                self._deliver(pending, record)

    async def save_rest(self) -> None:
        """Save what was finished but not yet saved when the run was cut short; nothing is delivered."""
        while group := self._waiting(COMMIT_RECORDS):
            if self._store is not None:
                await self._store.commit([pending.record() for pending in group])

    def discard(self) -> None:
        """Drop both ends of the queue."""
        self._send.close()
        self._receive.close()

    def _waiting(self, at_most: int) -> list[Pending]:
        group: list[Pending] = []
        while len(group) < at_most:
            try:
                group.append(self._receive.receive_nowait())
            except (anyio.WouldBlock, anyio.EndOfStream, anyio.ClosedResourceError):
                break
        return group

    async def _save(self, group: list[Pending]) -> None:
        delivered = [(pending, pending.record()) for pending in group]
        if self._store is not None:
            await self._store.commit([record for _, record in delivered])
        self._n_unsaved -= sum(isinstance(pending.result, Assembled) for pending in group)
        self._settled(group)
        for pending, record in delivered:
            self._count(pending, record)
        if self._order is not None:
            delivered = self._order.push([(pending.index, (pending, record)) for pending, record in delivered])
        for pending, record in delivered:
            self._deliver(pending, record)
        if self._on_progress is not None:
            self._on_progress()

    def _count(self, pending: Pending, record: EmbeddedText) -> None:
        summary = self._summary
        summary.texts += 1
        # 1. failed   2. an earlier run's   3. a repeat   4. this run's
        if record.error is not None:
            summary.failed += 1
            if len(self.failures) < KEPT_FAILURES:
                self.failures.append(record)
            if self._on_error == "raise":
                where = record.place or f"text {record.index}"
                raise TextsFailedError(f"{where} cannot be embedded: {record.error}")
        elif pending.cached:
            summary.cached += 1
        elif pending.is_duplicate:
            summary.duplicates += 1
        elif isinstance(pending.result, Assembled):
            summary.embedded += 1
            summary.chunks += len(record.chunks)
            summary.tokens += record.n_tokens
        else:
            raise AssertionError("a text was neither computed nor found: this is a bug")
