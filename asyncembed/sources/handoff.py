"""Hand items from one thread to another through a small bounded queue that either side can close."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition
from typing import Any


class Handoff:
    """Iterated in one thread, filled in another.

    Args:
        max_items: Items that may wait.
    """

    def __init__(self, max_items: int = 256) -> None:
        self._max_items = max_items
        self._items: deque[Any] = deque()
        self._changed = Condition()
        self._finished = False
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: Any) -> bool:
        """Hand an item over, waiting for room. False if the reader has closed: stop then."""
        with self._changed:
            while len(self._items) >= self._max_items and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._items.append(item)
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
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        """The items, as they come."""
        while True:
            with self._changed:
                while not (self._items or self._finished or self._closed):
                    self._changed.wait()
                if not self._items:
                    if self._error is not None and not self._closed:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
