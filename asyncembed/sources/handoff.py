"""Hand items from one thread to another through a small bounded queue that either side can close."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition
from typing import Any

from asyncembed.records import SourceItem
from asyncembed.sources.feed import to_item
from asyncembed.sources.pull import size_of


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
