"""The priority heap of chunks and the choice of the next batch: pure and synchronous.

Chunks wait in a window sorted by length, one for each class of priority and, where several share the model, each of
these clients. A batch is a run of such a window: rows of nearly one length, so little padding. Among all runs the one
with the most useful tokens for its cost is taken, and an age bound forces old chunks in, so that nobody waits for the
end of the stream. What is left when no more will come is taken from the longest down, in runs as short as their
padding makes worthwhile. Where somebody waits for an answer, batches are small and made of the oldest.

Simulated on 20,000 log-normal lengths (median 40, cut at 256) with a window of 32 batches, padding is 2.4 to 2.5 %
of the useful tokens for limits of 1,024 and 4,096; arrival order gives 170 to 210 %, longest first 19 to 163 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from asyncembed.engine.work import Client, Work
from asyncembed.records import Batch, Chunk

BATCH_OVERHEAD = 0.05
"""What a batch costs besides its padded tokens, as a part of a full one: the call, the layers' launches."""

INTERACTIVE_PART = 16
"""A batch for somebody who waits holds at most one in so many of the tokens that wait with it: small batches bring
each answer sooner, and find rows of one length among few."""

INTERACTIVE_LEAST = 3
"""But it may have one in so many of the limit's tokens, however few wait. The limit is what the device is fastest at: a
quarter of it costs OpenVINO 4 to 6 % of its speed and torch 10 or more, half of it OpenVINO none and torch 5 to 10."""

DIVIDED_ROWS = 128
"""More rows than this have neighbours of their own length: their best run is as good, and sooner found than divided."""

INTERACTIVE_WINDOW = 2.5
"""Such a batch is chosen among the oldest chunks, so many batches' worth: nobody is passed by for long."""

Int64s = npt.NDArray[np.int64]

Rows = slice | Int64s
"""Positions in a window."""


class Window:
    """The waiting chunks of one place, as columns sorted by length.

    Attributes:
        lengths: Tokens of each, prompt and special tokens included.
        born: When each came, by the heap's count of batches.
        tickets: The place of each among all that came.
    """

    def __init__(self) -> None:
        self.lengths: Int64s = np.empty(0, np.int64)
        self.born: Int64s = np.empty(0, np.int64)
        self.tickets: Int64s = np.empty(0, np.int64)
        self._fresh: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self.lengths) + len(self._fresh)

    def add(self, length: int, born: int, ticket: int) -> None:
        """Lets a row wait; `sort` brings it into its place."""
        self._fresh.append((length, born, ticket))

    def sort(self) -> None:
        """Brings what was added since the last choice into its place."""
        if not self._fresh:
            return
        fresh = np.array(self._fresh, np.int64)
        fresh = fresh[np.argsort(fresh[:, 0], kind="stable")]
        self._fresh.clear()
        at = np.searchsorted(self.lengths, fresh[:, 0], side="right")
        self.lengths = np.insert(self.lengths, at, fresh[:, 0])
        self.born = np.insert(self.born, at, fresh[:, 1])
        self.tickets = np.insert(self.tickets, at, fresh[:, 2])

    def keep(self, kept: npt.NDArray[np.bool_] | slice) -> None:
        """Drops all other rows."""
        self.lengths, self.born, self.tickets = self.lengths[kept], self.born[kept], self.tickets[kept]

    def cut(self, rows: Rows) -> list[int]:
        """Takes rows out: their tickets."""
        taken: list[int] = self.tickets[rows].tolist()
        kept = np.ones(len(self.lengths), np.bool_)
        kept[rows] = False
        self.keep(kept)
        return taken

    def first(self, limit: int, max_rows: int) -> Int64s:
        """The positions of the rows that came first, as many as the limit's tokens hold; at least one."""
        by_age = self._by_age()
        fitting = int(np.searchsorted(np.cumsum(self.lengths[by_age]), limit, side="right"))
        rows: Int64s = np.sort(by_age[: max(1, min(fitting, max_rows))])
        return rows

    def oldest(self, n_tokens: int) -> tuple[Int64s, int]:
        """The rows that came first, at least so many tokens of them if there are, in the window's order.

        Returns:
            Their positions, and which of these is the oldest row's.
        """
        by_age = self._by_age()
        enough = int(np.searchsorted(np.cumsum(self.lengths[by_age]), n_tokens)) + 1
        rows = np.sort(by_age[:enough])
        return rows, int(np.searchsorted(rows, by_age[0]))

    def _by_age(self) -> Int64s:
        """Positions, the oldest row's first. A hastened row is older than all others."""
        return np.argsort(np.where(self.born < 0, self.born, self.tickets), kind="stable")


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
    `DIVIDED_ROWS` at most, which take less than a millisecond.
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


def interactive_run(window: Window, limit: int, max_rows: int, share: int | None = None) -> tuple[Int64s, int]:
    """A small batch for somebody who waits: the oldest row, and what goes best with it among the oldest.

    Returns:
        Positions in the window, ascending, and the limit that they were chosen for.
    """
    limit = max(limit // INTERACTIVE_LEAST, min(limit, int(window.lengths.sum()) // INTERACTIVE_PART), 1)
    limit = min(limit, share) if share is not None else limit
    candidates, oldest = window.oldest(int(INTERACTIVE_WINDOW * limit))
    divide = shared_run if len(candidates) <= DIVIDED_ROWS else best_run
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


class ChunkHeap:
    """Chunks waiting for the model, and the choice of which run next.

    Lower priority numbers go first; clients of one class take turns. A batch is filled up with rows of other windows
    that need no further padding: without bound from its own class, and from later ones with as many rows as it has, so
    that urgent rows wait at most twice as long for their own batch. An old chunk of any class overrides all, so every
    wait is bounded.
    """

    def __init__(self, max_age: int = MAX_AGE, *, interactive_below: int = 0) -> None:
        self.max_age = max_age
        self.interactive_below = interactive_below
        self.n_tokens = 0
        self._windows: dict[tuple[int, Client], Window] = {}
        self._chunks: dict[int, Chunk] = {}
        self._next_ticket = 0
        self._clock = 0
        self._forced_at = -FORCED_EVERY
        self._interactive_at = -BESIDE - 1

    def __len__(self) -> int:
        return len(self._chunks)

    def __repr__(self) -> str:
        return f"<ChunkHeap chunks={len(self)} tokens={self.n_tokens} batches_given={self._clock}>"

    def is_deep(self, limit: int, max_rows: int | None) -> bool:
        """Whether several batches' worth waits."""
        return self.n_tokens >= SHALLOW * limit or (max_rows is not None and len(self) >= SHALLOW * max_rows)

    def most_urgent(self) -> int | None:
        """The most urgent class that waits and may run; None if there is none."""
        return min((priority for priority, client in self._windows if not client.is_held), default=None)

    def push(self, works: Iterable[Work]) -> None:
        """Lets all chunks of texts wait. Order among equals of length is kept."""
        for work in works:
            work.ticket = self._next_ticket
            for chunk in work.chunks:
                self._add(chunk, self._clock, self._next_ticket)
                self._next_ticket += 1

    def take(
        self, limit: int, max_rows: int | None = None, *, share: int | None = None, pads: bool = True
    ) -> Batch | None:
        """The next batch, or None if nothing waits that may run. Without padding it is the oldest rows."""
        places = [place for place in self._windows if not place[1].is_held]
        places.sort(key=_priority)
        if not places:
            return None
        rows = max(1, max_rows) if max_rows is not None else len(self._chunks)
        for place in places:
            self._windows[place].sort()
        chosen, forced = self._most_urgent(places)
        priority, client = chosen
        window = self._windows[chosen]
        run: Rows
        full = limit
        if priority < self.interactive_below:
            run, limit = interactive_run(window, limit, rows, share)
            self._interactive_at = self._clock
        else:
            if self._clock - self._interactive_at <= BESIDE:
                limit = max(1, limit // 2)
            limit = min(limit, share) if share is not None else limit
            run = slice(*_choose(client, window, limit, rows, forced)) if pads else window.first(limit, rows)
        longest = int(window.lengths[run][-1])
        taken = window.cut(run)
        n_own = len(taken)
        for other in places:
            room = min(rows, limit // longest) - len(taken)
            if other[0] > priority:
                room = min(room, 2 * n_own - len(taken))
            if other == chosen or room <= 0:
                continue
            filling = self._windows[other]
            end = int(np.searchsorted(filling.lengths, longest, side="right"))
            if end:
                taken += filling.cut(slice(max(0, end - room), end))
        self._clock += 1
        client.served_at = self._clock
        self._drop_empty()
        return Batch(tuple(map(self._pop, taken)), is_small=limit < full, pads=pads)

    def hasten(self, work: Work) -> bool:
        """Makes the chunks of a text the oldest of all, so that the next batch takes them. False if none wait."""
        found = False
        for window in self._windows_of(work.client):
            mine = _rows_of(window, [work])
            window.born[mine] = _HASTENED
            found = found or bool(mine.any())
        return found

    def discard(self, works: Sequence[Work]) -> int:
        """Drops the waiting chunks of texts of one client, in one pass; how many there were."""
        n_dropped = 0
        if works and (known := [work for work in works if work.ticket >= 0]):
            for window in self._windows_of(known[0].client):
                mine = _rows_of(window, known)
                if mine.any():
                    n_dropped += len([self._pop(ticket) for ticket in window.tickets[mine].tolist()])
                    window.keep(~mine)
            self._drop_empty()
        return n_dropped

    def discard_client(self, client: Client) -> None:
        """Drops all that waits of a client."""
        for place in [place for place in self._windows if place[1] is client]:
            window = self._windows.pop(place)
            window.sort()
            for ticket in window.tickets.tolist():
                self._pop(ticket)

    def clear(self) -> None:
        """Drops all that waits."""
        for client in {client for _, client in self._windows}:
            self.discard_client(client)

    def _add(self, chunk: Chunk, born: int, ticket: int) -> None:
        work: Work = chunk.work
        client, length = work.client, chunk.length
        self._chunks[ticket] = chunk
        self.n_tokens += length
        client.n_tokens += length
        client.n_chunks += 1
        place = (work.priority, client)
        window = self._windows.get(place)
        if window is None:
            window = self._windows[place] = Window()
        window.add(length, born, ticket)

    def _pop(self, ticket: int) -> Chunk:
        chunk = self._chunks.pop(ticket)
        client: Client = chunk.work.client
        self.n_tokens -= chunk.length
        client.n_tokens -= chunk.length
        client.n_chunks -= 1
        return chunk

    def _windows_of(self, client: Client) -> list[Window]:
        windows = [window for (_, owner), window in self._windows.items() if owner is client]
        for window in windows:
            window.sort()
        return windows

    def _drop_empty(self) -> None:
        for place in [place for place, window in self._windows.items() if not len(window)]:
            del self._windows[place]

    def _most_urgent(self, places: list[tuple[int, Client]]) -> tuple[tuple[int, Client], int | None]:
        """The window to serve, and the position in it that must be served."""
        classes = sorted({priority for priority, _ in places})
        may_force = self._clock - self._forced_at >= FORCED_EVERY
        is_alone = len(places) == 1
        latest, position = 0, -1
        overdue: tuple[int, Client] | None = None
        for place in places:
            priority, client = place
            born = self._windows[place].born
            oldest = int(np.argmin(born))
            lateness = self._clock - int(born[oldest]) - self.max_age * (classes.index(priority) + 1)
            is_end = is_alone and client.is_draining and born[oldest] != _HASTENED
            if lateness >= latest and not is_end and (may_force or priority == classes[0]):
                latest, overdue, position = lateness, place, oldest
        if overdue is not None:
            if overdue[0] != classes[0]:
                self._forced_at = self._clock
            return overdue, position
        urgent = [place for place in places if place[0] == classes[0]]
        return min(urgent, key=lambda place: place[1].served_at), None


def _priority(place: tuple[int, Client]) -> int:
    return place[0]


def _rows_of(window: Window, works: Sequence[Work]) -> npt.NDArray[np.bool_]:
    """Which rows of a window are of these texts, whose chunks have tickets in a row each."""
    tickets = [ticket for work in works for ticket in range(work.ticket, work.ticket + len(work.chunks))]
    found: npt.NDArray[np.bool_] = np.isin(window.tickets, tickets)
    return found


def _choose(client: Client, window: Window, limit: int, rows: int, forced: int | None) -> tuple[int, int]:
    if forced is None and (client.is_draining or int(window.lengths.sum()) < SHALLOW * limit):
        return last_run(window.lengths, limit, rows)
    return best_run(window.lengths, limit, rows, forced)
