"""A client of the engine: hands texts in, has them chunked in a thread of its own, and gets the finished ones back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anyio

from asyncembed.engine.chunking import chunk_backing_off
from asyncembed.engine.engine import Engine
from asyncembed.engine.scheduler import EncoderState
from asyncembed.engine.work import Client, Work
from asyncembed.errors import ClosedError
from asyncembed.threads import WorkerThread

WINDOW_BATCHES = 32
"""Depth of a client's window: see `heap` for what it buys. At 16,384 tokens a batch it is 2 MB of ids."""

WINDOW_CHUNKS = 20_000
"""Most chunks in the window, so that a choice stays under a millisecond."""

CALL_TEXTS = 256
CALL_CHARS = 1 << 15
"""Most texts and characters of one call of the tokenizer, some 25 ms of work: what is more urgent goes between two
calls."""

ChunkTexts = Callable[[Sequence[Work]], None]


def is_window_full(client: Client, encoder: EncoderState) -> bool:
    """Whether so many chunks of the client wait that no more of its texts should be chunked."""
    return client.n_chunks >= WINDOW_CHUNKS or client.n_tokens >= WINDOW_BATCHES * encoder.limit


class Intake:
    """Texts that wait to be chunked: by urgency, and within a class in the order they came."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[Work, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, work: Work) -> None:
        """Enqueues a text."""
        self._waiting.setdefault(work.priority, {})[work] = None

    def remove(self, work: Work) -> bool:
        """Drops a text; False if it does not wait."""
        waiting = self._waiting.get(work.priority, {})
        was_there = work in waiting
        if was_there:
            del waiting[work]
            if not waiting:
                del self._waiting[work.priority]
        return was_there

    def take(self, n_texts: int, n_chars: int) -> list[Work]:
        """The most urgent, no more than one call of the tokenizer takes; at least one, however long, if any waits."""
        taken: list[Work] = []
        for priority in sorted(self._waiting):
            for work in self._waiting[priority]:
                n_chars -= len(work.text)
                if taken and (len(taken) >= n_texts or n_chars < 0):
                    break
                taken.append(work)
            else:
                continue
            break
        for work in taken:
            self.remove(work)
        return taken

    def clear(self) -> None:
        """Drops all."""
        self._waiting.clear()


class EngineClient(Client):
    """One user's way into the engine; `run` works until it is closed and done.

    Finished texts come out as their waiters, from `finished`.

    Args:
        engine: Where its texts are embedded.
        chunk: Cuts texts into chunks, in a thread of the client's own.
        chunk_long: The same for long texts, in another thread; None leaves them to `chunk`.
        normalize: Scale vectors to length 1.
        truncate_dim: Keep only the first dimensions.
        max_unsaved: Computed texts that may wait to be saved before no more are computed.
    """

    def __init__(
        self,
        engine: Engine,
        chunk: ChunkTexts,
        *,
        chunk_long: ChunkTexts | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        max_unsaved: int | None = None,
    ) -> None:
        super().__init__(normalize=normalize, truncate_dim=truncate_dim)
        self.dropped_tokens = 0
        self.truncated_texts = 0
        self.unknown_tokens = 0
        self._engine = engine
        self._chunk = chunk
        self._chunk_long = chunk_long
        self._max_unsaved = max_unsaved
        self._thread = WorkerThread("asyncembed-tokenizer")
        self._long_thread = WorkerThread("asyncembed-long-texts")
        self._intake, self._long_intake = Intake(), Intake()
        self._open: set[Work] = set()
        self._done: list[Any] = []
        self._large: list[Work] = []
        self._n_computed = self._n_taken = 0
        self._changed, self._long_changed = asyncio.Event(), asyncio.Event()
        self._room, self._has_done = asyncio.Event(), asyncio.Event()
        self._error: Exception | None = None
        self._closed = self._ended = False
        engine.add(self)

    def __repr__(self) -> str:
        state = " stopped" if self.is_stopped else " closed" if self._closed else ""
        return f"<EngineClient open={len(self._open)}{state}>"

    def __len__(self) -> int:
        """Texts handed over that are not finished."""
        return len(self._open)

    async def submit(self, works: Sequence[Work]) -> None:
        """Hands texts over; waits while the window of chunks is full.

        Cancelled while waiting, none of them was taken.
        """
        while not self._closed and (self._intake or self._is_full()):
            self._room.clear()
            await self._room.wait()
        self.submit_nowait(works)

    def submit_nowait(self, works: Iterable[Work]) -> None:
        """Hands texts over, however many wait."""
        if self._closed:
            raise ClosedError("the engine takes no more texts: it has ended")
        for work in works:
            self._open.add(work)
            self._intake_of(work).add(work)
        self._changed.set()
        self._long_changed.set()

    def pass_on(self, waiters: Iterable[Any]) -> None:
        """Adds waiters of texts that need no computing to those that `finished` gives."""
        self._done += waiters
        self._has_done.set()

    async def finished(self) -> list[Any]:
        """The waiters of texts that are finished, at least one; none when all is over.

        With `max_unsaved`, the next call says that those given before are saved: until then no more is computed.
        """
        self._n_taken = 0
        self._update_held()
        while not self._done:
            if self._ended:
                return []
            self._has_done.clear()
            await self._has_done.wait()
        found, self._done = self._done, []
        self._n_taken, self._n_computed = self._n_computed, 0
        return found

    def finished_nowait(self) -> list[Any]:
        """What `finished` would give now: after a run that was cut short."""
        found, self._done = self._done, []
        return found

    def hasten(self, work: Work) -> None:
        """Puts a text's chunks into the next batch."""
        self._engine.hasten(work)

    def close(self) -> None:
        """No more texts will come: `run` ends when all are finished. Idempotent."""
        self._closed = True
        self._wake()

    def stop(self) -> None:
        """Finishes the batches in hand and ends `run`; texts that are not done then are dropped."""
        self._closed = True
        self._intake.clear()
        self._long_intake.clear()
        self._engine.stop(self)
        self._wake()

    def fail(self, error: Exception) -> None:
        """The engine has ended: `run` raises this."""
        self._error = error
        self.stop()

    def raise_priority(self, work: Work, priority: int) -> None:
        """Makes a text more urgent than it was, wherever it waits."""
        if work not in self._open or work.priority <= priority:
            return
        intake = self._intake_of(work)
        was_waiting = intake.remove(work)
        work.priority = priority
        if was_waiting:
            intake.add(work)
        else:
            self._engine.hasten(work)

    def discard(self, works: Sequence[Work]) -> None:
        """Nobody waits for these texts any more: drops them wherever they are, before they cost anything."""
        chunked: list[Work] = []
        for work in works:
            if work in self._open:
                self._open.discard(work)
                work.is_open = False
                if not self._intake_of(work).remove(work):
                    chunked.append(work)
        if chunked:  # once for all: each time costs a pass over the window
            self._engine.drop(chunked)
        self._wake()

    async def run(self) -> None:
        """Chunks what comes until closed and done, or stopped."""
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
            self._intake.clear()
            self._long_intake.clear()
            self._engine.stop(self)
            self._open.clear()
            self._ended = True
            self._wake()
            try:
                await self._thread.aclose()
            finally:
                await self._long_thread.aclose()

    def settled(self, done: Iterable[Work]) -> None:
        """A batch with chunks of this client has ended, and these texts are finished."""
        for work in done:
            if work not in self._open:
                continue
            self._open.discard(work)
            self._n_computed += work.error is None
            if work.is_large:
                self._large.append(work)
            else:
                self._done += work.take_waiters()
        self._update_held()
        self._has_done.set()
        self._room.set()
        if self._closed or self._large:
            self._changed.set()

    async def _work(self) -> None:
        """Chunks what comes until it is over; an error is left for `run`, not in a group of its own."""
        try:
            while self._error is None:
                if self._large:
                    large, self._large = self._large, []
                    await self._thread.run(_average_all, large)
                    for work in large:
                        self._done += work.take_waiters()
                    self._has_done.set()
                    continue
                if self._intake:
                    works = self._intake.take(CALL_TEXTS, CALL_CHARS)
                    await self._thread.run(chunk_backing_off, self._chunk, works)
                    self._take_in(works)
                    continue
                self.is_draining = self._closed and not self.is_stopped
                if self._is_over():
                    return
                self._changed.clear()
                await self._changed.wait()
        except Exception as error:
            self._error = error

    async def _chunk_long_texts(self, chunk: ChunkTexts) -> None:
        """Chunks long texts, one after the other, beside all others."""
        try:
            while True:
                self._long_changed.clear()
                while taken := self._long_intake.take(1, 0):
                    await self._long_thread.run(chunk_backing_off, chunk, taken)
                    self._take_in(taken)
                await self._long_changed.wait()
        except Exception as error:
            self.fail(error)

    def _take_in(self, works: Sequence[Work]) -> None:
        """Enqueues the chunks of texts that were cut."""
        ready: list[Work] = []
        failed: list[Work] = []
        for work in works:
            if not work.is_wanted:
                continue  # discarded meanwhile
            self.unknown_tokens += work.unknown_tokens
            if work.error is not None:
                work.fail(work.error)
                failed.append(work)
                continue
            self.dropped_tokens += work.dropped_tokens
            self.truncated_texts += work.dropped_tokens > 0
            work.expect()
            ready.append(work)
        self._engine.push(ready)
        self.settled(failed)

    def _intake_of(self, work: Work) -> Intake:
        is_long = self._chunk_long is not None and isinstance(work.text, str) and len(work.text) > CALL_CHARS
        return self._long_intake if is_long else self._intake

    def _is_over(self) -> bool:
        if self.is_stopped:
            return not self._engine.holds(self)
        return self._closed and not self._open

    def _is_full(self) -> bool:
        return is_window_full(self, self._engine.encoders[0].state)

    def _update_held(self) -> None:
        was_held = self.is_held
        self.is_held = self._max_unsaved is not None and self._n_taken + self._n_computed >= self._max_unsaved
        if was_held and not self.is_held:
            self._engine.wake()

    def _wake(self) -> None:
        for event in (self._changed, self._room, self._has_done):
            event.set()


def _average_all(works: Sequence[Work]) -> None:
    for work in works:
        work.average()
