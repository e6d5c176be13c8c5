"""Rows that wait, sorted by length, and the choice of a run of them: arithmetic alone.

A run is rows of nearly one length, so little padding. Which one is best depends on what follows: more rows, none, or
an answer that somebody waits for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
