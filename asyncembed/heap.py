"""The priority heap of chunks and the choice of the next batch: pure and synchronous.

Chunks wait in a window sorted by length, one for each class of priority and, where several share the model, each of
their lanes. A batch is a run of such a window: rows of nearly one length, so little padding. Among all runs the one
with the most useful tokens for its cost is taken, and an age bound forces old chunks in, so that nobody waits for the
end of the stream. What is left when no more will come is taken from the longest down, in runs as short as their
padding makes worthwhile. Where somebody waits for an answer, batches are small and made of the oldest.

Simulated on 20,000 log-normal lengths (median 40, cut at 256) with a window of 32 batches, padding is 2.4 to 2.5 %
of the useful tokens for limits of 1,024 and 4,096; arrival order gives 170 to 210 %, longest first 19 to 163 %.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asyncembed.records import Batch, Chunk, lane_of

BATCH_OVERHEAD = 0.05
"""What a batch costs besides its padded tokens, as a part of a full one: the call, the layers' launches."""

PROMPT_PART = 16
"""A batch for somebody who waits holds at most one in so many of the tokens that wait with it: small batches bring
each answer sooner, and find rows of one length among few."""

PROMPT_LEAST = 3
"""But it may have one in so many of the limit's tokens, however few wait. The limit is what the device is fastest at: a
quarter of it costs OpenVINO 4 to 6 % of its speed and torch 10 or more, half of it OpenVINO none and torch 5 to 10."""

PROMPT_ROWS = 128
"""More rows than this have neighbours of their own length: their best run is as good, and sooner found than divided."""

PROMPT_WINDOW = 2.5
"""Such a batch is chosen among the oldest chunks, so many batches' worth: nobody is passed by for long."""

Int64s = npt.NDArray[np.int64]

Rows = slice | Int64s
"""Positions in a window."""


class Window:
    """The waiting chunks of one place, as columns sorted by length.

    Attributes:
        lengths: Tokens of each, prompt and special tokens included.
        born: When each came, by the heap's count of batches.
        owners: The text of each.
        tickets: The place of each among all that came.
    """

    def __init__(self) -> None:
        self.lengths: Int64s = np.empty(0, np.int64)
        self.born: Int64s = np.empty(0, np.int64)
        self.owners: Int64s = np.empty(0, np.int64)
        self.tickets: Int64s = np.empty(0, np.int64)
        self._fresh: list[tuple[int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self.lengths) + len(self._fresh)

    def add(self, length: int, born: int, owner: int, ticket: int) -> None:
        """Let a row wait; `sort` brings it into its place."""
        self._fresh.append((length, born, owner, ticket))

    def sort(self) -> None:
        """Bring what was added since the last choice into its place."""
        if not self._fresh:
            return
        fresh = np.array(self._fresh, np.int64)
        fresh = fresh[np.argsort(fresh[:, 0], kind="stable")]
        self._fresh.clear()
        at = np.searchsorted(self.lengths, fresh[:, 0], side="right")
        self.lengths = np.insert(self.lengths, at, fresh[:, 0])
        self.born = np.insert(self.born, at, fresh[:, 1])
        self.owners = np.insert(self.owners, at, fresh[:, 2])
        self.tickets = np.insert(self.tickets, at, fresh[:, 3])

    def keep(self, kept: npt.NDArray[np.bool_] | slice) -> None:
        """Drop all other rows."""
        self.lengths, self.born = self.lengths[kept], self.born[kept]
        self.owners, self.tickets = self.owners[kept], self.tickets[kept]

    def cut(self, rows: Rows) -> list[tuple[int, int]]:
        """Take rows out: when each came, and its ticket."""
        taken = list(zip(self.born[rows].tolist(), self.tickets[rows].tolist(), strict=True))
        kept = np.ones(len(self.lengths), np.bool_)
        kept[rows] = False
        self.keep(kept)
        return taken

    def oldest(self, n_tokens: int) -> tuple[Int64s, int]:
        """The rows that came first, at least so many tokens of them if there are, in the window's order.

        Returns:
            Their positions, and which of these is the oldest row's. A hastened row is older than all others.
        """
        came = np.where(self.born < 0, self.born, self.tickets)
        by_age = np.argsort(came, kind="stable")
        enough = int(np.searchsorted(np.cumsum(self.lengths[by_age]), n_tokens)) + 1
        rows = np.sort(by_age[:enough])
        return rows, int(np.searchsorted(rows, by_age[0]))


def best_run(lengths: Int64s, limit: int, max_rows: int, forced: int | None = None) -> tuple[int, int]:
    """The contiguous run of sorted `lengths` with the most useful tokens for its cost, where more will come.

    Every run is named by its longest row: it takes as many rows below it as the limit allows. Its cost is its padded
    tokens and a batch's overhead, so padding and missing rows count alike.

    Returns:
        Start and stop of the run, in O(n) without a Python loop.
    """
    ends = np.arange(len(lengths), dtype=np.int64)
    capacity = np.clip(limit // lengths, 1, max_rows)
    starts = np.maximum(ends - capacity + 1, 0)
    total = np.concatenate(([0], np.cumsum(lengths)))
    cost = lengths * (ends - starts + 1 + BATCH_OVERHEAD * capacity)
    value = (total[ends + 1] - total[starts]) / cost
    if forced is not None:
        value = np.where((starts <= forced) & (ends >= forced), value, -1.0)
    best = len(lengths) - 1 - int(np.argmax(value[::-1]))  # among equals the longest rows: they are the rarest
    return int(starts[best]), best + 1


def last_run(lengths: Int64s, limit: int, max_rows: int) -> tuple[int, int]:
    """The run of the longest rows with the most useful tokens for its cost, where no more will come.

    Choosing the best run anywhere would leave crumbs of very different lengths for the end. On what 100 to 2,000
    log-normal rows leave, the cost is within 1 % of the optimal partition's, which dynamic programming gives.

    Args and returns are those of `best_run`.
    """
    longest = int(lengths[-1])
    capacity = min(max(1, limit // longest), max_rows, len(lengths))
    rows = np.arange(1, capacity + 1, dtype=np.int64)
    useful = np.cumsum(lengths[::-1][:capacity])
    overhead = BATCH_OVERHEAD * min(max(1, limit // longest), max_rows)
    best = int(np.argmax(useful / (longest * (rows + overhead))))
    return len(lengths) - best - 1, len(lengths)


def shared_run(lengths: Int64s, limit: int, max_rows: int, forced: int) -> tuple[int, int]:
    """The run around `forced` in the division of all `lengths` into runs that costs least.

    The best run around a row may leave rows behind that fit nothing else, and the next one is theirs. Dividing all of
    them leaves none: with 64 callers who each wait for one text (simulated with the token lengths of docstrings and
    of their first lines) padding is 1 to 4 % where best runs have 8 to 10, at the same p99 or less.

    Args and returns are those of `best_run`; `forced` must be given. O(n × rows of a run), in Python: for
    `PROMPT_ROWS` at most, which take less than a millisecond.
    """
    overhead = BATCH_OVERHEAD * limit
    ascending: list[int] = lengths.tolist()
    least, cuts = [0.0], [0]
    for stop, longest in enumerate(ascending, 1):
        capacity = min(stop, max_rows, max(1, limit // longest))
        cost, cut = min((least[first] + longest * (stop - first), first) for first in range(stop - capacity, stop))
        least.append(cost + overhead)
        cuts.append(cut)
    stop = len(ascending)
    while cuts[stop] > forced:
        stop = cuts[stop]
    return cuts[stop], stop


def prompt_run(window: Window, limit: int, max_rows: int, share: int | None = None) -> tuple[Int64s, int]:
    """A small batch for somebody who waits: the oldest row, and what goes best with it among the oldest.

    Returns:
        Positions in the window, ascending, and the limit that they were chosen for.
    """
    limit = max(limit // PROMPT_LEAST, min(limit, int(window.lengths.sum()) // PROMPT_PART), 1)
    limit = min(limit, share) if share is not None else limit
    candidates, oldest = window.oldest(int(PROMPT_WINDOW * limit))
    divide = shared_run if len(candidates) <= PROMPT_ROWS else best_run
    start, stop = divide(window.lengths[candidates], limit, max_rows, oldest)
    return candidates[start:stop], limit


MAX_AGE = 64
"""Batches after which a waiting chunk is forced into the next one."""

SHALLOW = 2
"""Batches' worth of tokens below which a window is treated like one that nothing is added to."""

FORCED_EVERY = 4
"""Of so many batches at most one is given to overdue chunks of a class that is not the most urgent one waiting: a
window that has grown old in a flood of urgent chunks must not hold these up by its whole depth in turn."""

BESIDE = 64
"""For so many choices after one for somebody who waits the others are half as large: the next caller then waits half as
long for them, at 2 to 10 % of the device's speed."""

_HASTENED = -(1 << 62)


class HeapStatistics(NamedTuple):
    """What waits: chunks, and their tokens with prompt and special tokens."""

    n_chunks: int
    n_tokens: int


class _Place(NamedTuple):
    """Which window: that of a class of priority and a lane."""

    priority: int
    lane: int


class ChunkHeap:
    """Chunks waiting for the model, and the choice of which run next.

    Lower priority numbers go first; lanes of one class take turns. A batch is filled up with rows of other windows that
    need no further padding: without bound from its own class, and from later ones with as many rows as it has, so
    that urgent rows wait at most twice as long for their own batch. An old chunk of any class overrides all, so every
    wait is bounded.
    """

    def __init__(self, max_age: int = MAX_AGE, *, prompt_below: int = 0) -> None:
        self.max_age = max_age
        self.prompt_below = prompt_below
        self._windows: dict[_Place, Window] = {}
        self._chunks: dict[int, Chunk] = {}
        self._tickets = count()
        self._n_tokens: dict[int, int] = {}
        self._clock = 0
        self._served: dict[int, int] = {}
        self._forced_at = -FORCED_EVERY
        self._prompt_at = -BESIDE - 1
        self._last: tuple[Batch | None, int, dict[int, int]] = (None, self._forced_at, self._served)
        self._draining: set[int] = set()

    def __len__(self) -> int:
        return len(self._chunks)

    def __repr__(self) -> str:
        return f"<ChunkHeap chunks={len(self)} tokens={self.n_tokens} batches_given={self._clock}>"

    @property
    def n_tokens(self) -> int:
        """Tokens that wait, prompt and special tokens included."""
        return sum(self._n_tokens.values())

    def statistics(self) -> HeapStatistics:
        """How much waits."""
        return HeapStatistics(len(self), self.n_tokens)

    def lane_statistics(self, lane: int) -> HeapStatistics:
        """How much of a lane waits."""
        n_chunks = sum(len(window) for place, window in self._windows.items() if place.lane == lane)
        return HeapStatistics(n_chunks, self._n_tokens.get(lane, 0))

    def most_urgent(self, held: Collection[int] = ()) -> int | None:
        """The most urgent class that waits in lanes that are not held back; None if there is none."""
        return min((place.priority for place in self._windows if place.lane not in held), default=None)

    def push(self, chunks: Iterable[Chunk]) -> None:
        """Let chunks wait. Order among equals of length is kept."""
        for chunk in chunks:
            self._add(chunk, self._clock, next(self._tickets))

    def drain(self, lane: int = 0) -> None:
        """No more chunks of the lane will come: from here on it matters what its batches leave behind."""
        self._draining.add(lane)

    def put_back(self, batch: Batch) -> None:
        """Let the chunks of a batch that did not run wait again, as old as they were.

        If it is the one that was taken last, nobody's turn was used up by it.
        """
        if batch is self._last[0]:
            _, self._forced_at, self._served = self._last
            self._last = (None, self._forced_at, self._served)
        if not batch.waited:
            self.push(batch.chunks)
        for chunk, (born, ticket) in zip(batch.chunks, batch.waited, strict=False):
            self._add(chunk, born, ticket)

    def take(
        self, limit: int, max_rows: int | None = None, held: Collection[int] = (), *, share: int | None = None
    ) -> Batch | None:
        """The next batch, or None if nothing waits."""
        places = sorted(place for place in self._windows if place.lane not in held)
        if not places:
            return None
        rows = max(1, max_rows) if max_rows is not None else len(self._chunks)
        for place in places:
            self._windows[place].sort()
        forced_at, served = self._forced_at, dict(self._served)
        chosen, forced = self._most_urgent(places)
        window = self._windows[chosen]
        run: Rows
        full = limit
        if chosen.priority < self.prompt_below:
            run, limit = prompt_run(window, limit, rows, share)
            self._prompt_at = self._clock
        else:
            if self._clock - self._prompt_at <= BESIDE:
                limit = max(1, limit // 2)
            limit = min(limit, share) if share is not None else limit
            run = slice(*self._choose(chosen.lane, window, limit, rows, forced))
        longest = int(window.lengths[run][-1])
        taken = window.cut(run)
        n_own = len(taken)
        for other in places:
            room = min(rows, limit // longest) - len(taken)
            if other.priority > chosen.priority:
                room = min(room, 2 * n_own - len(taken))
            if other == chosen or room <= 0:
                continue
            filling = self._windows[other]
            end = int(np.searchsorted(filling.lengths, longest, side="right"))
            if end:
                taken += filling.cut(slice(max(0, end - room), end))
        self._clock += 1
        self._served[chosen.lane] = self._clock
        self._drop_empty()
        popped = tuple(self._pop(ticket) for _, ticket in taken)
        batch = Batch(popped, tuple(taken), limit, is_small=limit < full)
        self._last = (batch, forced_at, served)
        return batch

    def hasten(self, owner: int) -> bool:
        """Make the chunks of a text the oldest of all, so that the next batch takes them. False if it has none here."""
        found = False
        for window in self._windows_of(lane_of(owner)):
            mine = window.owners == owner
            window.born[mine] = _HASTENED
            found = found or bool(mine.any())
        return found

    def discard(self, owner: int) -> int:
        """Drop the waiting chunks of a text; how many there were."""
        return len(self._remove([owner]))

    def discard_many(self, owners: Sequence[int]) -> int:
        """Drop the waiting chunks of texts of one lane, in one pass; how many there were."""
        return len(self._remove(owners)) if owners else 0

    def reprioritise(self, owner: int, priority: int) -> int:
        """Put the waiting chunks of a text into another class; how many there were."""
        chunks = self._remove([owner])
        self.push(replace(chunk, priority=priority) for chunk in chunks)
        return len(chunks)

    def discard_lane(self, lane: int) -> None:
        """Drop all that waits of a lane, and forget the lane."""
        for place in [place for place in self._windows if place.lane == lane]:
            window = self._windows.pop(place)
            window.sort()
            for ticket in window.tickets:
                self._pop(int(ticket))
        self._n_tokens.pop(lane, None)
        self._served.pop(lane, None)
        self._draining.discard(lane)

    def clear(self) -> None:
        """Drop all that waits."""
        self._windows.clear()
        self._chunks.clear()
        self._n_tokens.clear()

    def _choose(self, lane: int, window: Window, limit: int, rows: int, forced: int | None) -> tuple[int, int]:
        if forced is None and (lane in self._draining or int(window.lengths.sum()) < SHALLOW * limit):
            return last_run(window.lengths, limit, rows)
        return best_run(window.lengths, limit, rows, forced)

    def _add(self, chunk: Chunk, born: int, ticket: int) -> None:
        lane = lane_of(chunk.owner)
        self._chunks[ticket] = chunk
        self._n_tokens[lane] = self._n_tokens.get(lane, 0) + chunk.length
        window = self._windows.setdefault(_Place(chunk.priority, lane), Window())
        window.add(chunk.length, born, chunk.owner, ticket)

    def _pop(self, ticket: int) -> Chunk:
        chunk = self._chunks.pop(ticket)
        self._n_tokens[lane_of(chunk.owner)] -= chunk.length
        return chunk

    def _remove(self, owners: Sequence[int]) -> list[Chunk]:
        removed: list[Chunk] = []
        for window in self._windows_of(lane_of(owners[0])):
            mine = np.isin(window.owners, owners)
            if mine.any():
                removed += [self._pop(int(ticket)) for ticket in window.tickets[mine]]
                window.keep(~mine)
        self._drop_empty()
        return removed

    def _windows_of(self, lane: int) -> list[Window]:
        windows = [window for place, window in self._windows.items() if place.lane == lane]
        for window in windows:
            window.sort()
        return windows

    def _drop_empty(self) -> None:
        for place in [place for place, window in self._windows.items() if not len(window)]:
            del self._windows[place]

    def _most_urgent(self, places: list[_Place]) -> tuple[_Place, int | None]:
        """The window to serve, and the position in it that must be served."""
        classes = sorted({place.priority for place in places})
        may_force = self._clock - self._forced_at >= FORCED_EVERY
        is_alone = len(places) == 1
        overdue: list[tuple[int, _Place, int]] = []
        for place in places:
            born = self._windows[place].born
            oldest = int(np.argmin(born))
            lateness = self._clock - int(born[oldest]) - self.max_age * (classes.index(place.priority) + 1)
            is_end = is_alone and place.lane in self._draining and born[oldest] != _HASTENED
            if lateness >= 0 and not is_end and (may_force or place.priority == classes[0]):
                overdue.append((lateness, place, oldest))
        if overdue:
            _, place, position = max(overdue)
            if place.priority != classes[0]:
                self._forced_at = self._clock
            return place, position
        urgent = [place for place in places if place.priority == classes[0]]
        return min(urgent, key=lambda place: self._served.get(place.lane, 0)), None
