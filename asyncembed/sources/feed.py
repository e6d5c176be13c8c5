"""Any iterable of texts as micro-batches on the event loop, which it never blocks.

One bounded buffer stands between the source and its reader, whoever fills it: a thread that pulls a synchronous
iterable, a task that pulls an asynchronous one, or the thread of a caller who hands items over.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import reprlib
import threading
from collections import deque
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeAlias

from asyncembed.errors import ClosedError, OptionsError
from asyncembed.iterables import check_source, without_line_ends
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.files import FileTexts
from asyncembed.wording import kind_of, why_no_text

_log = logging.getLogger("asyncembed")

CLOSE_GRACE_S = 0.2
"""How long closing waits for a source's thread that is inside `next()` before it is left to itself."""


class Handoff:
    """The buffer: filled in one thread, taken from by one reader, bounded in number and in characters of items.

    Items become `Text` or `Rejected` on the way in. There is no lock, which a Ctrl-C in the filling thread could leave
    taken: each number has one writer, and who waits says so before it looks again.
    """

    def __init__(self, max_items: int = 256, max_chars: int = 1 << 20) -> None:
        self._max_items = max_items
        self._max_chars = max_chars
        self._items: deque[SourceItem] = deque()
        self.n_put = self._n_taken = 0
        self._chars_put = self._chars_taken = 0
        self.is_ended = self.is_closed = False
        self._error: BaseException | None = None
        self._room: SimpleQueue[None] = SimpleQueue()
        self._filler_waits = self._reader_waits = False
        self._wake: Callable[[], object] = _nothing

    def __len__(self) -> int:
        return self.n_put - self._n_taken

    def __repr__(self) -> str:
        state = " closed" if self.is_closed else " ended" if self.is_ended else ""
        return f"<Handoff items={len(self)} chars={self.n_chars}{state}>"

    @property
    def n_chars(self) -> int:
        """Characters of the items that wait."""
        return self._chars_put - self._chars_taken

    # --- who fills it ---

    def has_room(self, n_chars: int = 1) -> bool:
        """Whether an item of that size fits now; any item does when none waits."""
        n_items = len(self)
        return not n_items or (n_items < self._max_items and self.n_chars + n_chars <= self._max_chars)

    def wait_for_room(self, n_chars: int = 1) -> bool:
        """Block until an item of that size fits; False if the reader wants no more."""
        while not self.is_closed and not self.has_room(n_chars):
            self._filler_waits = True
            if not self.is_closed and not self.has_room(n_chars):
                self._room.get()
        return not self.is_closed

    def put(self, item: Any) -> bool:
        """Hand an item over, waiting for room. False if the reader has closed: stop then."""
        record = to_item(item, self.n_put)
        if not self.wait_for_room(size_of(record)):
            return False
        self.add(record)
        return True

    def add(self, record: SourceItem) -> None:
        """Hand over an item for which there is room."""
        self._chars_put += size_of(record)
        self.n_put += 1
        self._items.append(record)
        self._wake_reader()

    def finish(self, error: BaseException | None = None) -> None:
        """No more items will come; the reader raises `error` after the last."""
        self._error = error
        self.is_ended = True
        self._wake()  # in any case: an error may have come between the flag's fall and the call before

    def _wake_reader(self) -> None:
        if self._reader_waits:
            self._reader_waits = False
            self._wake()

    # --- its reader ---

    def attach(self, wake: Callable[[], object]) -> None:
        """`wake` is called, in any thread, when something has come after a `take` that gave nothing."""
        self._wake = wake

    def take(self) -> list[SourceItem] | None:
        """All that waits, at once; None if that is nothing and no more will come."""
        has_ended = self.is_ended or self.is_closed  # asked before the items: what comes last is not left behind
        items = self._take_all()
        if not items and not has_ended:
            self._reader_waits = True
            items = self._take_all()
            if not items and self.is_ended:
                items = self._take_all()
                has_ended = True
        if items and self._filler_waits:
            self._filler_waits = False
            self._room.put(None)
        return None if has_ended and not items else items

    def _take_all(self) -> list[SourceItem]:
        items = [self._items.popleft() for _ in range(len(self._items))]
        self._n_taken += len(items)
        self._chars_taken += sum(map(size_of, items))
        return items

    def take_error(self) -> BaseException | None:
        """What ended the source, once; nothing after `close`."""
        error, self._error = self._error, None
        return error if not self.is_closed else None

    def close(self) -> None:
        """The reader wants no more: what waits is dropped."""
        self.is_closed = True
        self._take_all()
        self._room.put(None)


def _nothing() -> None:
    """Nobody is to be woken yet."""


def size_of(item: SourceItem) -> int:
    """Characters of an item, as the bound of the buffer counts them."""
    return len(item.content or "") if isinstance(item, Rejected) else len(item.text)


Source: TypeAlias = Iterable[Any] | AsyncIterable[Any] | Handoff
"""What a feed takes."""


class TextFeed:
    """Turns any sync or async iterable of `str | Text | Rejected` into micro-batches on the event loop.

    Iterate it with `async for` for non-empty lists of `Text | Rejected`. An item that is neither, nor a `str`,
    becomes a `Rejected` with its position. A slow source's item is given at once, a fast source's in full batches.
    What the source raises is raised unchanged, after all items before it.

    A synchronous iterable is pulled in one daemon thread (no executor's: those are joined when the interpreter ends,
    and one that hangs in `next()` must not hold that up), an asynchronous one in one task, and a `Handoff` is filled by
    its owner. At most `max_items` items and about `max_bytes` are pulled ahead, and one item in hand.

    Raises:
        OptionsError: The source cannot be one of texts; or a bound is below 1.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_items: int = 256,
        max_bytes: int = 1 << 20,
    ) -> None:
        if max_items < 1 or max_bytes < 1:
            raise OptionsError(f"max_items={max_items!r} and max_bytes={max_bytes!r} must be at least 1")
        self._source: Any = None
        if isinstance(source, Handoff):
            self._handoff = source
        else:
            check_source(source)
            self._source = without_line_ends(source)
            self._handoff = Handoff(max_items, max_bytes)
        self._started = False
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._thread_gone = asyncio.Event()
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False

    def __repr__(self) -> str:
        ended = "ended" if self._handoff.is_ended else "open" if self._started else "not started"
        return f"<TextFeed {'closed' if self._closed else ended} pulled={self._handoff.n_put} {self._handoff!r}>"

    async def __aenter__(self) -> TextFeed:
        self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> TextFeed:
        return self

    async def __anext__(self) -> list[SourceItem]:
        """The next micro-batch, never empty. Cancelled while waiting, it loses nothing.

        Raises:
            ClosedError: The feed was closed before its source had ended.
        """
        while not self._ended:
            self._start()
            # Cleared before looking, so that what arrives in between is not slept over.
            self._arrived.clear()
            batch = self._handoff.take()
            self._room.set()
            # 1. Items; 2. the end, by an error or not; 3. nothing yet.
            if batch:
                return batch
            if batch is None:
                self._error = self._error or self._handoff.take_error()
                await self._stop()  # cancelled here, the next call raises the error
                self._ended = True
                _raise(self._error)
                break
            await self._arrived.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop the source and drop what was pulled ahead. Idempotent.

        A thread that hangs in the source's `next()` is waited for no longer than `CLOSE_GRACE_S`, then left alone: it
        ends by itself if `next()` ever returns. An asynchronous source is cancelled and awaited.
        """
        if not self._closed:
            self._closed = True
            self._arrived.set()
            await self._stop()

    async def _stop(self) -> None:
        self._handoff.close()
        self._room.set()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._thread is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._thread_gone.wait(), CLOSE_GRACE_S)
                self._thread.join()  # telling us was the last it had to do: this takes microseconds

    def _start(self) -> None:
        if self._closed:
            raise ClosedError("this feed of texts has been closed; make a new one")
        if self._started:
            return
        self._started = True
        loop = asyncio.get_running_loop()

        def call_loop(function: Callable[[], object]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to be told
                loop.call_soon_threadsafe(function)

        if isinstance(self._source, AsyncIterable):
            self._handoff.attach(self._arrived.set)
            self._task = asyncio.create_task(self._pull_async(self._source), name="asyncembed-source")
            return
        self._handoff.attach(lambda: call_loop(self._arrived.set))
        if self._source is not None:
            context, gone = contextvars.copy_context(), lambda: call_loop(self._thread_gone.set)
            arguments = (_pull, self._source, self._handoff, gone)
            self._thread = threading.Thread(target=context.run, args=arguments, name="asyncembed-source", daemon=True)
            self._thread.start()

    async def _pull_async(self, source: AsyncIterable[Any]) -> None:
        """Every `anext()`, and `aclose()` at the end, run in this task."""
        error: BaseException | None = None
        try:
            iterator = aiter(source)
            try:
                while await self._has_room():
                    try:
                        item = await anext(iterator)
                    except StopAsyncIteration:
                        break
                    record = to_item(item, self._handoff.n_put)
                    if await self._has_room(size_of(record)):
                        self._handoff.add(record)
            finally:
                if hasattr(iterator, "aclose"):
                    await iterator.aclose()
        except asyncio.CancelledError as raised:
            error = raised
            raise
        except BaseException as raised:  # handed to the reader, which raises it
            error = raised
            _log_if_late(self._handoff, raised)
        finally:
            self._handoff.finish(error)
            self._arrived.set()

    async def _has_room(self, n_chars: int = 1) -> bool:
        """Waits until an item fits; False if the reader wants no more, also where a source swallows cancellation."""
        while not self._handoff.has_room(n_chars) and not self._handoff.is_closed:
            self._room.clear()
            await self._room.wait()
        return not self._handoff.is_closed


def _pull(source: Iterable[Any], handoff: Handoff, gone: Callable[[], object]) -> None:
    """The thread of a synchronous iterable: `iter()`, every `next()`, and `close()`."""
    error: BaseException | None = None
    iterator: Iterator[Any] | None = None
    try:
        iterator = iter(source)
        while handoff.wait_for_room():
            try:
                item = next(iterator)
            except StopIteration:
                break
            handoff.put(item)
    except BaseException as raised:  # handed to the reader, which raises it
        error = raised
        _add_cure(raised)
    try:
        # The generator is left by nobody else; other iterators, such as a cursor or an open file, are not ours.
        if isinstance(iterator, (Generator, FileTexts)):
            iterator.close()
    except BaseException as raised:
        if error is not None:
            _log.warning("the source of texts failed while it was closed: %r", raised)
        else:
            _log_if_late(handoff, raised)
        error = error or raised
    handoff.finish(error)
    gone()


def _log_if_late(handoff: Handoff, error: BaseException) -> None:
    if handoff.is_closed:
        _log.warning("the source of texts failed while it was closed: %r", error)


def _raise(error: BaseException | None) -> None:
    """Raise what ended the source; what would end the reader's loop without a word is said to be an error."""
    if isinstance(error, (StopIteration, StopAsyncIteration, asyncio.CancelledError)):
        raise RuntimeError(f"the source of texts raised {type(error).__name__}") from error
    if error is not None:
        raise error


def _add_cure(error: BaseException) -> None:
    """Say in the error of a cursor that belongs to one thread how it is used in another."""
    if type(error).__module__ == "sqlite3" and "same thread" in str(error):
        error.args = (
            f"{error} The texts are pulled in a thread of their own: open the connection with "
            "sqlite3.connect(…, check_same_thread=False), or use EmbeddingGenerator, which pulls in your own thread.",
        )


def to_item(item: Any, position: int) -> SourceItem:
    """An item of an iterable as one that travels; what is no text becomes a `Rejected` that says where it stood."""
    # 1. A str; of a subclass (an enum, a NumPy string) only the characters.
    if type(item) is str:
        return Text(item)
    if isinstance(item, str):
        return Text(str.__str__(item))
    # 2. What travels already.
    if isinstance(item, Rejected):
        return item
    key = None
    if isinstance(item, Text):
        key = _key_of(item)
        if item.key is not None and key is None:
            reason = f"the key of item {position} of the input is {kind_of(item.key)}, not a str"
            return Rejected(reason, content=_describe(item.text))
        if isinstance(item.text, str):
            return item if key is item.key else replace(item, key=key)
        item = item.text
    # 3. Anything else.
    reason = why_no_text(f"item {position} of the input", item)
    return Rejected(reason, key=key, content=_describe(item))


def _key_of(text: Text) -> str | None:
    """The key as it is kept: a number of a row as its digits."""
    key: object = text.key
    return str(key) if isinstance(key, int) and not isinstance(key, bool) else key if isinstance(key, str) else None


def _describe(item: object) -> str | None:
    """A short representation of an item of any type; None if it has none."""
    try:
        return reprlib.repr(item)
    except Exception:  # whatever a foreign __repr__ raises says nothing about the input
        return None
