"""Any iterable of texts as micro-batches on the event loop, which it never blocks, or handed over by another thread."""

from __future__ import annotations

import asyncio
import reprlib
from collections import deque
from collections.abc import AsyncIterable, Iterable, Iterator
from dataclasses import replace
from threading import Condition
from typing import Any, NamedTuple

from asyncembed.errors import ClosedError, OptionsError
from asyncembed.iterables import check_source, without_line_ends
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.pull import Buffer, Puller, TaskPuller, ThreadPuller, size_of
from asyncembed.wording import kind_of, why_no_text


class Handoff:
    """Iterated in one thread, filled in another. Items become `Text` or `Rejected` on the way in."""

    def __init__(self, max_items: int = 256, max_chars: int = 1 << 20) -> None:
        self._max_items = max_items
        self._max_chars = max_chars
        self._items: deque[SourceItem] = deque()
        self._n_chars = 0
        self._n_put = 0
        self._changed = Condition()
        self._finished = False
        self._closed = False
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        state = " closed" if self._closed else " finished" if self._finished else ""
        return f"<Handoff items={len(self)} chars={self._n_chars}{state}>"

    @property
    def n_chars(self) -> int:
        """Characters of the items that wait."""
        return self._n_chars

    def has_room(self, n_chars: int) -> bool:
        """Whether an item of that size fits now; any item does when none waits."""
        if not self._items:
            return True
        return len(self._items) < self._max_items and self._n_chars + n_chars <= self._max_chars

    def put(self, item: Any) -> bool:
        """Hand an item over, waiting for room. False if the reader has closed: stop then."""
        record = to_item(item, self._n_put)
        n_chars = size_of(record)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.has_room(n_chars))
            if not self._closed:
                self._items.append(record)
                self._n_chars += n_chars
                self._n_put += 1
                self._changed.notify_all()
            return not self._closed

    def finish(self, error: BaseException | None = None) -> None:
        """No more items will come; the reader raises `error` after the last."""
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """The reader wants no more."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._n_chars = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[SourceItem]:
        """The items, as they come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._finished or self._closed)
                if not self._items:
                    if self._error is not None and not self._closed:
                        raise self._error
                    return
                item = self._items.popleft()
                self._n_chars -= size_of(item)
                self._changed.notify_all()
            yield item


class FeedStatistics(NamedTuple):
    """How a feed stands.

    Attributes:
        n_pulled: Items the source has given.
        n_buffered: Of these, those the reader has not taken.
        n_batches: Batches the reader has taken.
        ended: The source has ended or the feed was closed.
    """

    n_pulled: int
    n_buffered: int
    n_batches: int
    ended: bool


class TextFeed:
    """Turns any sync or async iterable of `str | Text | Rejected` into micro-batches on the event loop.

    Iterate it with `async for` for non-empty lists of `Text | Rejected`. An item that is neither, nor a `str`,
    becomes a `Rejected` with its position. A slow source's item is given at once, a fast source's in full batches.
    What the source raises is raised unchanged, after all items before it.

    A synchronous iterable is pulled in one daemon thread, an asynchronous one in one task. At most `max_items` items
    and about `max_bytes` are pulled ahead, and one item in hand.

    Raises:
        OptionsError: The source cannot be one of texts; or a bound is below 1.
    """

    def __init__(
        self, source: Iterable[Any] | AsyncIterable[Any], *, max_items: int = 256, max_bytes: int = 1 << 20
    ) -> None:
        check_source(source)
        if max_items < 1 or max_bytes < 1:
            raise OptionsError(f"max_items={max_items!r} and max_bytes={max_bytes!r} must be at least 1")
        self._source = without_line_ends(source)
        self._buffer = Buffer(max_items, max_bytes)
        self._puller: Puller | None = None
        self._arrived = asyncio.Event()
        self._n_batches = 0
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False

    def __repr__(self) -> str:
        now = self.statistics()
        state = "closed" if self._closed else "ended" if now.ended else "open" if self._puller else "not started"
        return f"<TextFeed {state} pulled={now.n_pulled} buffered={now.n_buffered} batches={now.n_batches}>"

    def statistics(self) -> FeedStatistics:
        """How the feed stands."""
        ended = self._closed or self._buffer.ended
        return FeedStatistics(self._buffer.n_pulled, len(self._buffer), self._n_batches, ended)

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
            puller = self._start()
            # Cleared before looking, so that what arrives in between is not slept over.
            self._arrived.clear()
            batch = puller.take()
            # 1. Items; 2. the end, by an error or not; 3. nothing yet.
            if batch:
                self._n_batches += 1
                return batch
            if batch is None:
                self._error = self._error or self._buffer.take_error()
                await puller.aclose()
                self._ended = True
                self._raise_error()
                break
            await self._arrived.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop the source and drop what was pulled ahead. Idempotent.

        A thread that hangs in the source's `next()` is waited for no longer than `pull.CLOSE_GRACE_S`, then left
        alone: it ends by itself if `next()` ever returns. An asynchronous source is cancelled and awaited.
        """
        if self._closed:
            return
        self._closed = True
        self._arrived.set()
        if self._puller is not None:
            await self._puller.aclose()

    def _start(self) -> Puller:
        if self._closed:
            raise ClosedError("this feed of texts has been closed; make a new one")
        if self._puller is None:
            if isinstance(self._source, AsyncIterable):
                self._puller = TaskPuller(self._source, to_item, self._buffer, self._arrived.set)
            else:
                self._puller = ThreadPuller(self._source, to_item, self._buffer, self._arrived.set)
            self._puller.start()
        return self._puller

    def _raise_error(self) -> None:
        """Raise what ended the source; what would end the reader's loop without a word is said to be an error."""
        error, self._error = self._error, None
        if isinstance(error, (StopIteration, StopAsyncIteration, asyncio.CancelledError)):
            raise RuntimeError(f"the source of texts raised {type(error).__name__}") from error
        if error is not None:
            raise error


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
