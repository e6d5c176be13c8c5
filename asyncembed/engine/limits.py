"""Learn how many tokens a batch may have, from success, failure and speed: pure, no clock, no device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, sqrt
from statistics import mean, stdev

BETTER = 1.04
"""A size must be better by so much: it costs memory, and latency to whoever waits."""

MIN_PAIRS = 3
MAX_PAIRS = 12
"""Samples of two sizes, in pairs: how many are needed depends on how much they differ among themselves."""

SURE_OF_WIN = 1.8
SURE_OF_LOSS = 0.8
"""Standard errors that the mean gain must be away from nothing, to win; from `BETTER`, to lose."""

LEAST_SPREAD = 0.06
"""Pairs that agree by chance are not believed to agree better than this."""

CLIP = 0.4
"""The most that one pair may count for, as a logarithm: a batch that met something else on the machine."""

PATIENCE = 40
"""Samples after which a size is given up that batches do not fill."""


class SpeedSearch:
    """Finds the size between two bounds at which most tokens run in a second.

    The best size so far takes turns with its double while doubling helps; if it never does, with its half. A batch is
    a sample of a size if it fills more than half of it. The first sample of each size does not count: kernels are
    chosen then.

    Attributes:
        best: The best size so far, which is not always the one being tried.
        measured: The sizes that had a sample.
    """

    def __init__(self, start: int, smallest: int, largest: int) -> None:
        self.best = start
        self.measured: set[int] = set()
        self._start, self._smallest, self._largest = start, smallest, largest
        self._goes_up = True
        self._challenge()

    def __repr__(self) -> str:
        return f"<SpeedSearch size={self.size} best={self.best}{' over' if self.is_over else ''}>"

    @property
    def size(self) -> int:
        """What the next batch should have, in padded tokens."""
        return self._rival if self._n_samples % 2 else self.best

    @property
    def is_over(self) -> bool:
        """Whether no other size is tried any more."""
        return self._rival == self.best

    def stop(self) -> None:
        """End the search with the best size so far."""
        self._rival = self.best

    def add(self, n_tokens: int, seconds: float) -> None:
        """A batch of `n_tokens` padded tokens took `seconds`; `size` may be another one afterwards."""
        if self.is_over or seconds <= 0:
            return
        for size in {self.best, self._rival}:
            if size < 2 * n_tokens <= 2 * size:
                self._n_samples += 1
                if size in self.measured:
                    self._samples[size].append(log(n_tokens / seconds))
                self.measured.add(size)
        if self._n_samples > PATIENCE:
            self._turn()
        else:
            self._judge()

    def _judge(self) -> None:
        pairs = zip(self._samples[self.best], self._samples[self._rival], strict=False)
        gains = [max(-CLIP, min(CLIP, theirs - ours)) for ours, theirs in pairs]
        if len(gains) < MIN_PAIRS:
            return
        gain, error = mean(gains), max(stdev(gains), LEAST_SPREAD) / sqrt(len(gains))
        if gain > log(BETTER) and gain > SURE_OF_WIN * error:
            self.best = self._rival
            self._challenge()
        elif gain + SURE_OF_LOSS * error < log(BETTER) or len(gains) >= MAX_PAIRS:
            self._turn()

    def _challenge(self) -> None:
        """Let the next size in the direction of the search take turns with the best one."""
        self._rival = 2 * self.best if self._goes_up else self.best // 2
        self._samples: dict[int, list[float]] = {self.best: [], self._rival: []}
        self._n_samples = 0
        if not self._smallest <= self._rival <= self._largest:
            self._turn()

    def _turn(self) -> None:
        """Go down if up brought nothing, else stop."""
        if self._goes_up and self.best == self._start:
            self._goes_up = False
            self._challenge()
        else:
            self.stop()


DEFAULT_MIN_LIMIT = 16
DEFAULT_INITIAL_LIMIT = 2048
SUCCESSES_TO_RISE = 8
SUCCESSES_TO_FORGET = 512

SMALLEST_PART = 8
"""A batch says something about the limit if it is at least one in so many of it: while callers wait, batches are a
quarter of the limit, and it must find its way back all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntLimit:
    """What one run learns for the next: padded tokens (rows × longest), all of them at least 1.

    Attributes:
        limit: The limit in use.
        failed_at: The smallest size known to run out of memory; None if none is.
        killed_at: The smallest size under way when a run was killed; None if none was.
        fastest: The size that gave the most tokens per second; None if the search has not ended.
        successes: Batches near the limit since a size failed last: after enough of them it is doubted.
        is_old: The search for the fastest size is due again, beginning from what is known.
    """

    limit: int
    failed_at: int | None = None
    killed_at: int | None = None
    fastest: int | None = None
    successes: int = 0
    is_old: bool = False

    def after_kill(self, n_tokens: int) -> LearntLimit:
        """What is known when a run was killed while it first ran `n_tokens` padded tokens: begin well below."""
        killed_at = min(n_tokens, self.killed_at or n_tokens)
        half = max(1, killed_at // 2)
        fastest = self.fastest if self.fastest is not None and self.fastest <= half else None
        return replace(self, limit=min(self.limit, half), killed_at=killed_at, fastest=fastest)


class TokenLimitEstimator:
    """The current limit of a batch in padded tokens (rows × longest).

    Memory is learned by halving and bisecting: a failure at `n` puts the limit at half of it, and steady success
    near the limit raises it half-way towards the smallest size known to fail, until the two are within an eighth.
    A known failure is doubted after 512 successes near the limit, since the memory may have been a passing
    neighbour's. A size at which a run was killed is not doubted: the limit stays at half of it.

    A replacement needs the same three methods: call, `succeed`, `fail`.

    Args:
        initial_limit: The first limit, tried as given. None takes 2,048 (within `max_limit`).
        min_limit: The search for speed never goes below this. A failure may.
        max_limit: The limit never passes this; None takes the start: it recovers from failures and grows no further.
        learnt: What an earlier run learnt on this machine; its limit comes before `initial_limit`.
        tunes_speed: Try larger and smaller sizes on the first batches, where their seconds are given. Memory has the
            last word.

    Raises:
        ValueError: The bounds leave no room, or a limit is below 1.
    """

    def __init__(
        self,
        initial_limit: int | None = None,
        min_limit: int = DEFAULT_MIN_LIMIT,
        max_limit: int | None = None,
        *,
        learnt: LearntLimit | None = None,
        tunes_speed: bool = False,
    ) -> None:
        if initial_limit is not None and initial_limit < 1:
            raise ValueError(f"initial_limit={initial_limit} must be at least 1")
        if min_limit < 1 or (max_limit is not None and max_limit < min_limit):
            raise ValueError(f"min_limit={min_limit} and max_limit={max_limit} leave no room for a limit")
        if initial_limit is not None and max_limit is not None and initial_limit > max_limit:
            raise ValueError(f"initial_limit={initial_limit} is above max_limit={max_limit}")
        start = initial_limit if initial_limit is not None else DEFAULT_INITIAL_LIMIT
        self.min_limit = min_limit
        self.max_limit = max_limit if max_limit is not None else max(start, min_limit)
        self._start = start if initial_limit is not None else min(max(start, min_limit), self.max_limit)
        known = learnt if learnt is not None else LearntLimit(limit=self._start)
        self._failed_at, self._killed_at = known.failed_at, known.killed_at
        self._streak = known.successes
        self._room: int | None = None
        self._proven = 0
        self._is_recalled = known.failed_at is not None
        self._fastest = known.fastest if tunes_speed else None
        self._tunes_speed = tunes_speed
        self._search = SpeedSearch(self.max_limit, self.max_limit, self.max_limit)  # is over
        if tunes_speed:
            best = min(self._fastest or self._start, self._ceiling())
            self._search = SpeedSearch(best, min(min_limit, best), self._ceiling())
            # A size that failed, or was killed for, before any was the fastest: a search would lead back there.
            if not known.is_old if self._fastest is not None else self._failed_at or self._killed_at:
                self._search.stop()
        self._limit = self._start if learnt is None else max(1, min(known.limit, self._ceiling()))

    def __call__(self) -> int:
        """The current limit in padded tokens, at least 1."""
        return self._limit

    def __repr__(self) -> str:
        return f"<TokenLimitEstimator limit={self._limit} failed_at={self._failed_at} max={self.max_limit}>"

    @property
    def failed_at(self) -> int | None:
        """The smallest size in padded tokens known to fail; None if none is."""
        return self._failed_at

    def learnt(self) -> LearntLimit:
        """What the next run should know."""
        search = self._search
        limit = self._limit if search.is_over else max(1, min(search.best, self._ceiling()))
        fastest = search.best if search.is_over and search.measured else self._fastest
        if self._failed_at is not None:  # a limit that has just risen may never have been used
            limit = max(1, min(limit, max(self._proven, self._failed_at // 2)))
        return LearntLimit(
            limit=limit,
            failed_at=self._failed_at,
            killed_at=self._killed_at,
            fastest=fastest,
            successes=self._streak,
            is_old=fastest is not None and not search.is_over,
        )

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """A batch of `n_tokens` padded tokens ran, in `seconds`; None if they are no sample of the limit's speed."""
        if self._failed_at is not None and n_tokens >= self._failed_at:
            self._failed_at = None
        self._proven = max(self._proven, n_tokens)
        if seconds is not None and not self._search.is_over:
            self._search.add(n_tokens, seconds)
            self._limit = min(self._search.size, self._ceiling())
        if SMALLEST_PART * n_tokens < self._limit:
            return  # says nothing about the limit
        self._streak += 1
        if self._failed_at is not None and self._streak >= SUCCESSES_TO_FORGET:
            self._failed_at = None
        if self._streak % SUCCESSES_TO_RISE == 0:
            # Small batches lead back to the first limit, or the fastest size; only full ones lead above.
            self._rise(self.max_limit if self._tunes_speed or 2 * n_tokens > self._limit else self._start)

    def fail(self, n_tokens: int) -> None:
        """A batch of `n_tokens` padded tokens ran out of memory: the limit falls below it."""
        self._failed_at = n_tokens if self._failed_at is None else min(self._failed_at, n_tokens)
        self._limit = max(1, min(self._limit, n_tokens // 2))
        self._streak = 0
        self._proven = self._proven if self._proven < n_tokens else 0
        self._is_recalled = False
        self._search.stop()

    def keep_below(self, n_tokens: int) -> None:
        """There is memory for no more than so many padded tokens at the moment: no larger batch is tried.

        Thread-safe: assigns two ints.
        """
        self._room = max(1, n_tokens)
        self._limit = min(self._limit, self._room)

    def _ceiling(self) -> int:
        """The largest limit that nothing known speaks against: at least 1."""
        bounds = (
            self._search.size,
            self._failed_at - 1 if self._failed_at is not None else None,
            self._killed_at // 2 if self._killed_at is not None else None,
            self._room,
        )
        return max(1, min(bound for bound in bounds if bound is not None))

    def _rise(self, highest: int) -> None:
        if self._is_recalled and self._failed_at is not None:
            return  # an earlier run has looked for the limit already: short jobs must not do it again and again
        ceiling = min(highest, self._ceiling())
        if self._limit >= ceiling or (self._failed_at is not None and ceiling - self._limit <= self._limit // 8):
            return
        halfway = (self._limit + ceiling + 1) // 2 if self._failed_at is not None else ceiling
        self._limit = min(2 * self._limit, halfway)


def initial_limit(device: str, slots: int = 1) -> int:
    """A first limit for a device, in padded tokens; on a CPU it stays the largest.

    On a CPU 1,024 where one batch has all cores, and 512 where several run at once, are within 3 % of the best, on
    long and on short texts, in float32 and bfloat16; half or twice as much loses up to 12 % (all-MiniLM-L6-v2 on
    torch and OpenVINO, two cores). A GPU wants tens of thousands.
    """
    if not device.startswith("cpu"):
        return 16_384
    return 1024 if slots <= 2 else 512  # of several slots one waits behind the others


def estimator_for(
    device: str, token_limit: int | None = None, *, learnt: LearntLimit | None = None, slots: int = 1
) -> TokenLimitEstimator:
    """The estimator of a job on a device, where the model has `slots` batches under way at once.

    A limit of the user's own is not exceeded. Without one, `learnt` comes before the device's, and a GPU's
    fastest size is searched for.
    """
    if token_limit is not None:
        return TokenLimitEstimator(token_limit, min_limit=min(128, token_limit))
    start, on_gpu = initial_limit(device, slots), not device.startswith("cpu")
    largest = 16 * start if on_gpu else start
    return TokenLimitEstimator(start, min_limit=128, max_limit=largest, learnt=learnt, tunes_speed=on_gpu)
