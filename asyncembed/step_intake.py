"""What the steps take from an iterator: items, each with room reserved for its whole life."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from asyncembed.admission import AdmissionQueue
from asyncembed.job import Pending
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.feed import to_item

MICRO_BATCH = 64
"""Items taken, and texts tokenised, in one go."""

_END = object()


class StepIntake:
    """Takes items while they fit the budget.

    Attributes:
        open: Items taken and not yet released, by position.
        n_taken: Items taken so far.
    """

    def __init__(
        self,
        max_bytes: int,
        life_of: Callable[[str], int],
        on_skipped: Callable[[list[tuple[str | None, Rejected]]], None],
    ) -> None:
        self.open: dict[int, Pending] = {}
        self.n_taken = 0
        self._admission = AdmissionQueue(max_bytes)
        self._life_of = life_of
        self._on_skipped = on_skipped
        self._held_back: SourceItem | None = None
        self._n_pulled = 0

    def __repr__(self) -> str:
        return f"<StepIntake open={len(self.open)} {self._admission!r}>"

    def take(self, iterator: Iterator[Any], group: list[Pending]) -> tuple[bool, bool]:
        """Take a micro-batch into `group`, which also has what came before an error of the iterator.

        Returns:
            Whether the iterator has ended, and whether the budget is full.
        """
        skipped: list[tuple[str | None, Rejected]] = []
        ended = is_full = False
        while not (ended or is_full) and len(group) + len(skipped) < MICRO_BATCH:
            item = self._next(iterator)
            if item is None:
                ended = True
            elif isinstance(item, Rejected) and item.skipped:
                skipped.append((None, item))
            else:
                is_full = not self._admit(item, group)
        if skipped:
            self._on_skipped(skipped)
        return ended, is_full

    def release(self, pending: Pending) -> None:
        """An item is done with: give its reservation back."""
        self._admission.release(self.open.pop(pending.index).reserved)

    def _next(self, iterator: Iterator[Any]) -> SourceItem | None:
        item, self._held_back = self._held_back, None
        if item is None and (given := next(iterator, _END)) is not _END:
            item = to_item(given, self._n_pulled)
            self._n_pulled += 1
        return item

    def _admit(self, item: SourceItem, group: list[Pending]) -> bool:
        """Reserve an item's life; without room for it, it is held back for the next time."""
        reserved = self._life_of(item.text if isinstance(item, Text) else "")
        if not self._admission.reserve_nowait(reserved):
            self._held_back = item
            return False
        pending = Pending(item, self.n_taken, reserved)
        self.n_taken += 1
        self.open[pending.index] = pending
        group.append(pending)
        return True
