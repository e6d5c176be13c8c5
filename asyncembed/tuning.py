"""Find the batch size that gives the most tokens per second: pure, no clock.

The size in use and one twice or half as large take turns, so that whatever else the machine does meets both alike.
Only a clear win moves it, one step at a time: up from the first size as long as that wins, else down. Then it stays.
"""

from __future__ import annotations

from math import log, sqrt
from statistics import mean, stdev

BETTER = 1.04
"""A size must be better by so much: it costs memory, and latency to whoever waits."""

MIN_PAIRS = 3
MAX_PAIRS = 12
"""Pairs of a challenge: how many are needed depends on how much they differ among themselves."""

SURE_OF_WIN = 1.8
SURE_OF_LOSS = 0.8
"""Standard errors that the mean gain must be away from nothing, to win; from `BETTER`, to lose."""

LEAST_SPREAD = 0.06
"""Pairs that agree by chance are not believed to agree better than this."""

CLIP = 0.4
"""The most that one pair may count for, as a logarithm: a batch that met something else on the machine."""

WARM_UP = 2
"""First samples that are not counted: caches are cold and kernels are chosen."""

FULL = 0.5
"""A batch was made for a size if it fills more than this of it: where enough waits, every batch does, since one row
more than half as long as the size stands alone."""

OVERLAPPED = 4
"""Batches of a sample for each that runs at once, where several do: at its ends up to half of one counts amiss."""

PATIENCE = 40
"""Samples' worth of batches after which a challenge without an end is given up: batches do not fill such a size."""


class SpeedTuner:
    """Chooses a size between bounds from the measured speed of batches.

    A batch's `seconds` are those from the end of the batch before it (or its own start, if the model was idle) to
    its own end. Of batches that overlap only their sum means anything, so several of one size in a row make a sample,
    without the first ones, which overlapped with those of the other size: each of them would be taken for what the
    others had under way, and the smaller size for up to a third faster than it is.
    """

    def __init__(self, start: int, smallest: int, largest: int, *, slots: int = 1, settled: bool = False) -> None:
        self._smallest = smallest
        self._largest = largest
        n_streams = max(1, slots - 1)
        self._n_skipped = slots - 1
        self._turn = self._n_skipped + (OVERLAPPED * n_streams if slots > 1 else 1)
        self._start = self._best = start
        self._rival: int | None = None
        self._tried = {start}
        self._goes_up = True
        self._samples: dict[int, list[float]] = {}
        self._open: tuple[int | None, list[tuple[int, float]]] = (None, [])
        self._n_added = 0
        self._n_warm = 0
        self._is_settled = settled or smallest >= largest

    def __repr__(self) -> str:
        return f"<SpeedTuner size={self.size} best={self._best}{' settled' if self._is_settled else ''}>"

    @property
    def size(self) -> int:
        """What the next batch should have, in padded tokens."""
        if self._rival is None:
            return self._best
        return self._rival if self._n_added // self._turn % 2 == 0 else self._best

    @property
    def best(self) -> int:
        """The best size so far, which is not always the one being tried."""
        return self._best

    @property
    def is_settled(self) -> bool:
        """Whether the search is over."""
        return self._is_settled

    @property
    def has_measured(self) -> bool:
        """Whether any batch was measured; if none was, nothing is known about speed."""
        return self._n_warm > 0

    def settle(self) -> None:
        """A batch did not fit into memory, which matters more: the search ends with the best size so far."""
        self._rival = None
        self._is_settled = True

    def add(self, n_tokens: int, seconds: float) -> None:
        """A batch of `n_tokens` padded tokens took `seconds`; `size` may be another one afterwards."""
        if self._is_settled or seconds <= 0:
            return
        if self._rival is not None:
            self._n_added += 1
        self._collect(self._size_of(n_tokens), n_tokens, seconds)
        if not self._is_settled and self._n_added > PATIENCE * self._turn:
            self._lose()

    def _size_of(self, n_tokens: int) -> int | None:
        """Which of the two sizes a batch was made for: it comes some batches after it was asked for."""
        for size in sorted({self._best, self._rival or self._best}):
            if FULL * size < n_tokens <= size:
                return size
        return None

    def _collect(self, size: int | None, n_tokens: int, seconds: float) -> None:
        if size is None:
            self._open = (None, [])
            return
        same, batches = self._open
        if same != size:
            batches = []
        batches.append((n_tokens, seconds))
        self._open = (size, batches)
        if len(batches) < self._turn:
            return
        self._open = (None, [])
        batches = batches[self._n_skipped :]
        self._n_warm += 1
        if self._n_warm <= WARM_UP:
            return
        if self._rival is None:
            self._challenge()
            return
        self._samples.setdefault(size, []).append(log(sum(n for n, _ in batches) / sum(s for _, s in batches)))
        self._judge(self._rival)

    def _judge(self, rival: int) -> None:
        pairs = zip(self._samples.get(self._best, ()), self._samples.get(rival, ()), strict=False)
        gains = [max(-CLIP, min(CLIP, theirs - ours)) for ours, theirs in pairs]
        if len(gains) < MIN_PAIRS:
            return
        gain, error = mean(gains), max(stdev(gains), LEAST_SPREAD) / sqrt(len(gains))
        if gain > log(BETTER) and gain > SURE_OF_WIN * error:
            self._best = rival
            self._challenge()
        elif gain + SURE_OF_LOSS * error < log(BETTER) or len(gains) >= MAX_PAIRS:
            self._lose()

    def _lose(self) -> None:
        """The challenger is no better. On the way up the other side is still to be tried, if up brought nothing."""
        if self._goes_up and self._best == self._start:
            self._goes_up = False
            self._challenge()
        else:
            self.settle()

    def _challenge(self) -> None:
        """Let the next size in the direction of the search take turns with the best one."""
        up, down = 2 * self._best, self._best // 2
        if self._goes_up and up > self._largest:
            self._goes_up = self._best != self._start
        rival = up if self._goes_up else down
        if not self._smallest <= rival <= self._largest or rival in self._tried:
            self.settle()
            return
        self._tried.add(rival)
        self._rival, self._n_added = rival, 0
        self._samples.clear()
        self._open = (None, [])
