"""Find the batch size that gives the most tokens per second: pure, no clock.

Sizes are tried by doubling up and then halving down from the first one, each on a few full batches; the best median
wins, and of two that are as good the smaller. Then it stays: the search costs some twenty batches, once.
"""

from __future__ import annotations

from statistics import median

TRIAL_BATCHES = 4
"""Batches of a trial; the median of so many is within some 5 % on a noisy two-core machine."""

WARM_UP_BATCHES = 2
"""First batches that are not counted: caches are cold and kernels are chosen."""

BETTER = 1.03
"""A larger size must be better by so much: it costs memory, and latency to whoever waits."""

FULL = 0.75
"""A batch says something about a size if it fills so much of it."""


class SpeedTuner:
    """Chooses a size between bounds from the measured speed of batches.

    Args:
        start: The first size, in padded tokens.
        smallest: Never try less.
        largest: Never try more.
    """

    def __init__(self, start: int, smallest: int, largest: int) -> None:
        self.size = start
        self._smallest = smallest
        self._largest = largest
        self._rates: dict[int, list[float]] = {}
        self._medians: dict[int, float] = {}
        self._start = self._best = start
        self._goes_up = True
        self._n_seen = 0
        self._is_settled = smallest >= largest

    def __repr__(self) -> str:
        return f"<SpeedTuner size={self.size} best={self._best}{' settled' if self._is_settled else ''}>"

    @property
    def is_settled(self) -> bool:
        """Whether the search is over."""
        return self._is_settled

    @property
    def has_measured(self) -> bool:
        """Whether any batch was measured; if none was, nothing is known about speed."""
        return self._n_seen > 0

    def settle_below(self, n_tokens: int) -> None:
        """A batch of `n_tokens` did not fit into memory, which matters more: the search ends with a smaller size."""
        self.size = max(1, min(self._best, n_tokens - 1))
        self._is_settled = True

    def add(self, n_tokens: int, seconds: float) -> None:
        """A batch of `n_tokens` padded tokens took `seconds`; `size` may be another one afterwards."""
        if self._is_settled or seconds <= 0 or not FULL * self.size <= n_tokens <= self.size:
            return
        self._n_seen += 1
        if self._n_seen <= WARM_UP_BATCHES:
            return
        rates = self._rates.setdefault(self.size, [])
        rates.append(n_tokens / seconds)
        if len(rates) >= TRIAL_BATCHES:
            self._finish_trial(median(rates))

    def _finish_trial(self, rate: float) -> None:
        tried = self.size
        self._medians[tried] = rate
        won = tried == self._best or self._is_better(tried)
        if won:
            self._best = tried
        # 1. on the way up, as long as it wins   2. from the start down, if up brought nothing   3. that was it
        if self._goes_up:
            if won and self._try(2 * tried):
                return
            self._goes_up = False
            if self._best == self._start and self._try(self._start // 2):
                return
        elif won and self._try(tried // 2):
            return
        self.size = self._best
        self._is_settled = True

    def _is_better(self, tried: int) -> bool:
        needed = self._medians[self._best] * (BETTER if tried > self._best else 1 / BETTER)
        return self._medians[tried] > needed

    def _try(self, size: int) -> bool:
        if not self._smallest <= size <= self._largest or size in self._medians:
            return False
        self.size = size
        return True
