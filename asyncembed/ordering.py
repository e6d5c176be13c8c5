"""Put results back into the order of the input: pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

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
