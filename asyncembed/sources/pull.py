"""What pulls a source: a thread for a synchronous iterable, a task for an asynchronous one.

Both fill a bounded buffer, and wake the reader on the event loop only while it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

from asyncembed.records import Rejected, SourceItem
from asyncembed.sources.files import FileTexts

_log = logging.getLogger("asyncembed")

CLOSE_GRACE_S = 0.2
"""How long closing waits for a source's thread that is inside `next()` before it is left to itself."""

Convert = Callable[[Any, int], SourceItem]
"""Makes an item of the source, at its position, one that travels."""


class Buffer:
    """Items between a source and its reader, bounded in number and in characters. Pure: it never waits.

    Attributes:
        n_chars: Characters of the items held.
        n_pulled: Items put so far.
        ended: The source gives no more.
        error: What ended the source, until the reader takes it.
        stopped: The reader wants no more.
    """

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._items: list[SourceItem] = []
        self.n_chars = 0
        self.n_pulled = 0
        self.ended = False
        self.error: BaseException | None = None
        self.stopped = False

    def __len__(self) -> int:
        return len(self._items)

    def has_room(self, n_chars: int = 1) -> bool:
        """Whether an item of that size fits; any item does when nothing is held."""
        if not self._items:
            return True
        return len(self._items) < self._max_items and self.n_chars + n_chars <= self._max_bytes

    def put(self, item: SourceItem) -> None:
        """Hold an item for the reader."""
        self._items.append(item)
        self.n_chars += size_of(item)
        self.n_pulled += 1

    def take(self) -> list[SourceItem] | None:
        """All that is held; None if that is nothing and the source has ended."""
        items, self._items, self.n_chars = self._items, [], 0
        return None if self.ended and not items else items

    def take_error(self) -> BaseException | None:
        """What ended the source, once."""
        error, self.error = self.error, None
        return error

    def finish(self, error: BaseException | None) -> None:
        """The source has ended, by an error or not."""
        self.ended = True
        if not self.stopped:
            self.error = error

    def stop(self) -> None:
        """The reader wants no more: drop what is held."""
        self.stopped = True
        self.error = None
        self.take()


def size_of(item: SourceItem) -> int:
    """Characters of an item, as the bound of the buffer counts them."""
    return len(item.content or "") if isinstance(item, Rejected) else len(item.text)


class Puller(Protocol):
    """What the feed asks of whatever pulls its source. All but `aclose` return at once."""

    buffer: Buffer

    def start(self) -> None:
        """Begin to pull."""

    def take(self) -> list[SourceItem] | None:
        """What has been pulled, None at the end; after an empty list `wake` is called when there is more."""

    async def aclose(self) -> None:
        """Stop pulling."""


class ThreadPuller:
    """Pulls a synchronous iterable in one daemon thread of its own: `iter()`, every `next()`, and `close()`.

    It is no executor's thread, as those are joined when the interpreter ends, and one that hangs in `next()` must
    not hold that up.
    """

    def __init__(self, source: Iterable[Any], convert: Convert, buffer: Buffer, wake: Callable[[], None]) -> None:
        self.buffer = buffer
        self._source = source
        self._convert = convert
        self._wake = wake
        self._changed = threading.Condition()  # guards the buffer and `_reader_waits`
        self._reader_waits = False
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="asyncembed-source", daemon=True)

    def start(self) -> None:
        """Begin to pull."""
        self._thread.start()

    def take(self) -> list[SourceItem] | None:
        """What has been pulled, None at the end; after an empty list `wake` is called when there is more."""
        with self._changed:
            items = self.buffer.take()
            self._reader_waits = items == []
            self._changed.notify()
            return items

    async def aclose(self) -> None:
        """Stop the thread: at once if it waits for room, else after its `next()`, which is waited for only shortly."""
        with self._changed:
            self.buffer.stop()
            self._changed.notify()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._gone.wait(), CLOSE_GRACE_S)
            self._thread.join()  # telling us was the last it had to do: this takes microseconds

    def _run(self) -> None:
        error: BaseException | None = None
        iterator: Iterator[Any] | None = None
        try:
            iterator = iter(self._source)
            self._pull(iterator)
        except BaseException as raised:  # handed to the reader, which raises it
            error = raised
            _add_cure(raised)
        try:
            # The generator is left by nobody else; other iterators, such as a cursor or an open file, are not ours.
            if isinstance(iterator, (Generator, FileTexts)):
                iterator.close()
        except BaseException as raised:
            error = self._error_at_close(error, raised)
        self._finish(error)

    def _pull(self, iterator: Iterator[Any]) -> None:
        position = 0
        while self._has_room(1):
            try:
                item = next(iterator)
            except StopIteration:
                return
            if not self._put(self._convert(item, position)):
                return
            position += 1

    def _has_room(self, n_chars: int) -> bool:
        """Waits until an item of that size fits; False if the reader wants no more."""
        # Without the lock first: the reader only makes room, and nobody but this thread takes it up.
        if not self.buffer.stopped and self.buffer.has_room(n_chars):
            return True
        with self._changed:
            self._changed.wait_for(lambda: self.buffer.stopped or self.buffer.has_room(n_chars))
            return not self.buffer.stopped

    def _put(self, item: SourceItem) -> bool:
        """Hands an item over; False if the reader wants no more."""
        if not self._has_room(size_of(item)):
            return False
        with self._changed:
            self.buffer.put(item)
            self._wake_reader()
        return True

    def _finish(self, error: BaseException | None) -> None:
        with self._changed:
            self.buffer.finish(error)
            self._wake_reader()
        self._call_loop(self._gone.set)

    def _wake_reader(self) -> None:
        if self._reader_waits:
            self._reader_waits = False
            self._call_loop(self._wake)

    def _call_loop(self, function: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function)

    def _error_at_close(self, error: BaseException | None, raised: BaseException) -> BaseException:
        """The error that the reader gets; one that it can get no more is logged."""
        if self.buffer.stopped or error is not None:
            _log.warning("the source of texts failed while it was closed: %r", raised)
        return error or raised


def _add_cure(error: BaseException) -> None:
    """Say in the error of a cursor that belongs to one thread how it is used in another."""
    if type(error).__module__ == "sqlite3" and "same thread" in str(error):
        error.args = (
            f"{error} The texts are pulled in a thread of their own: open the connection with "
            "sqlite3.connect(…, check_same_thread=False), or use EmbeddingGenerator, which pulls in your own thread.",
        )


class TaskPuller:
    """Pulls an asynchronous iterable in one task: every `anext()`, and `aclose()` at the end, run in that task."""

    def __init__(self, source: AsyncIterable[Any], convert: Convert, buffer: Buffer, wake: Callable[[], None]) -> None:
        self.buffer = buffer
        self._source = source
        self._convert = convert
        self._wake = wake
        self._room = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to pull."""
        self._task = asyncio.create_task(self._run(), name="asyncembed-source")

    def take(self) -> list[SourceItem] | None:
        """What has been pulled, None at the end; `wake` is called for all that comes later."""
        items = self.buffer.take()
        self._room.set()
        return items

    async def aclose(self) -> None:
        """Cancel the task and wait for its end. Cancelled itself, it leaves the task to end alone."""
        self.buffer.stop()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        error: BaseException | None = None
        try:
            await self._pull_and_close()
        except asyncio.CancelledError as raised:
            error = raised
            raise
        except BaseException as raised:  # handed to the reader, which raises it
            error = raised
            if self.buffer.stopped:
                _log.warning("the source of texts failed while it was closed: %r", raised)
        finally:
            self.buffer.finish(error)
            self._wake()

    async def _pull_and_close(self) -> None:
        iterator = aiter(self._source)
        try:
            position = 0
            while True:
                await self._wait_for_room(1)
                try:
                    item = await anext(iterator)
                except StopAsyncIteration:
                    return
                if self.buffer.stopped:  # a source may swallow the cancellation: that must not keep it running
                    return
                record = self._convert(item, position)
                await self._wait_for_room(size_of(record))
                self.buffer.put(record)
                self._wake()
                position += 1
        finally:
            if hasattr(iterator, "aclose"):
                await iterator.aclose()

    async def _wait_for_room(self, n_chars: int) -> None:
        while not self.buffer.has_room(n_chars) and not self.buffer.stopped:
            self._room.clear()
            await self._room.wait()
