"""Learn how many tokens a batch may have, from success, failure and speed: pure, no clock, no device."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from math import log, sqrt
from statistics import mean, stdev
from typing import Any

BETTER = log(1.04)
"""A size must be better by so much: it costs memory, and latency to whoever waits."""

MIN_PAIRS, MAX_SAMPLES = 3, 34
"""Samples of two sizes, in pairs: how many are needed depends on how much they differ among themselves."""

SURE_OF_WIN, SURE_OF_LOSS = 1.8, 0.8
"""Standard errors that the mean gain must be away from nothing, to win; from `BETTER`, to lose."""

LEAST_SPREAD, CLIP = 0.06, 0.4
"""Pairs that agree by chance are not believed to agree better; one that met something else counts for no more."""


class SpeedSearch:
    """Finds the size between two bounds at which most tokens run in a second.

    The best size so far takes turns with its double while doubling helps; if it never does, with its half. A batch is
    a sample of a size if it fills more than half of it. The first two do not count: kernels are chosen then.
    """

    def __init__(self, start: int, smallest: int, largest: int) -> None:
        self.best = start  # so far
        self.is_over = self.has_measured = False
        self._bounds = smallest, largest
        self._trials = self._try_all(smallest, largest)
        self.size = next(self._trials)  # of the next batch, in padded tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins at the best size so far, and searches anew unless this has ended."""
        return SpeedSearch, (self.best, *((self.best, self.best) if self.is_over else self._bounds))

    def add(self, n_tokens: int, seconds: float) -> None:
        """A batch of `n_tokens` padded tokens took `seconds`; `size` may be another one afterwards."""
        if not self.is_over and seconds > 0:
            self.size = self._trials.send((n_tokens, log(n_tokens / seconds)))

    def stop(self) -> None:
        """Ends the search with the best size so far."""
        self.is_over, self.size = True, self.best

    def _try_all(self, smallest: int, largest: int) -> Generator[int, tuple[int, float], None]:
        start = self.best
        for factor in (2, 0.5):
            while smallest <= (rival := int(factor * self.best)) <= largest and (yield from self._is_better(rival)):
                self.best = rival
            if self.best != start:
                break
        self.is_over = True
        yield self.best

    def _is_better(self, rival: int) -> Generator[int, tuple[int, float], bool]:
        speeds: dict[int, list[float]] = {self.best: [], rival: []}
        while (n_samples := sum(map(len, speeds.values()))) < MAX_SAMPLES:
            n_tokens, speed = yield rival if n_samples % 2 else self.best
            for size, found in speeds.items():
                if size < 2 * n_tokens <= 2 * size:
                    found.append(speed)
                    self.has_measured = True
            pairs = zip(speeds[self.best][1:], speeds[rival][1:], strict=False)
            gains = [max(-CLIP, min(CLIP, theirs - ours)) for ours, theirs in pairs]
            if len(gains) < MIN_PAIRS:
                continue
            gain, error = mean(gains), max(stdev(gains), LEAST_SPREAD) / sqrt(len(gains))
            if gain > max(BETTER, SURE_OF_WIN * error):
                return True
            if gain + SURE_OF_LOSS * error < BETTER:
                return False
        return False


DEFAULT_INITIAL_LIMIT = 2048
SUCCESSES_TO_RISE = 8
SUCCESSES_TO_FORGET = 512

SMALLEST_PART = 8
"""A batch says something about the limit if it is at least one in so many of it: while callers wait, batches are a
quarter of the limit, and it must find its way back all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntLimit:
    """What one run learns for the next: sizes in padded tokens (rows × longest), all of them at least 1."""

    limit: int  # in use
    failed_at: int | None = None  # the smallest that is known to run out of memory
    killed_at: int | None = None  # the smallest that was under way when a run was killed
    fastest: int | None = None  # what gave the most tokens a second; None if the search has not ended
    successes: int = 0  # batches near the limit since a size failed last: after enough of them it is doubted
    is_old: bool = False  # the search for the fastest is due again, beginning from what is known

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

    A replacement needs the same three methods: call, `succeed`, `fail`. `failed_at` is the smallest size known to
    fail, or None.

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
        min_limit: int = 16,
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
        start = initial_limit or max(DEFAULT_INITIAL_LIMIT, min_limit)
        self.min_limit = min_limit
        self.max_limit = max_limit or max(start, min_limit)
        self._start = min(start, self.max_limit)
        known = learnt if learnt is not None else LearntLimit(limit=self._start)
        self.failed_at, self._killed_at = known.failed_at, known.killed_at
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
            if not known.is_old if self._fastest is not None else self.failed_at or self._killed_at:
                self._search.stop()
        self._limit = self._start if learnt is None else max(1, min(known.limit, self._ceiling()))

    def __call__(self) -> int:
        """The current limit in padded tokens, at least 1."""
        return self._limit if self._room is None else min(self._limit, self._room)

    def __repr__(self) -> str:
        return f"<TokenLimitEstimator limit={self()} failed_at={self.failed_at} max={self.max_limit}>"

    def learnt(self) -> LearntLimit:
        """What the next run should know."""
        search = self._search
        limit = self._limit if search.is_over else max(1, min(search.best, self._ceiling()))
        fastest = search.best if search.is_over and search.has_measured else self._fastest
        if self.failed_at is not None:  # a limit that has just risen may never have been used
            limit = max(1, min(limit, max(self._proven, self.failed_at // 2)))
        return LearntLimit(
            limit=limit,
            failed_at=self.failed_at,
            killed_at=self._killed_at,
            fastest=fastest,
            successes=self._streak,
            is_old=fastest is not None and not search.is_over,
        )

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """A batch of `n_tokens` padded tokens ran, in `seconds`; None if they are no sample of the limit's speed."""
        if self.failed_at is not None and n_tokens >= self.failed_at:
            self.failed_at = None
        self._proven = max(self._proven, n_tokens)
        if seconds is not None and not self._search.is_over:
            self._search.add(n_tokens, seconds)
            self._limit = min(self._search.size, self._ceiling())
        if SMALLEST_PART * n_tokens < self():
            return  # says nothing about the limit
        self._streak += 1
        if self.failed_at is not None and self._streak >= SUCCESSES_TO_FORGET:
            self.failed_at = None
        if self._streak % SUCCESSES_TO_RISE == 0:
            # Small batches lead back to the first limit, or the fastest size; only full ones lead above.
            self._rise(self.max_limit if self._tunes_speed or 2 * n_tokens > self() else self._start)

    def fail(self, n_tokens: int) -> None:
        """A batch of `n_tokens` padded tokens ran out of memory: the limit falls below it."""
        self.failed_at = n_tokens if self.failed_at is None else min(self.failed_at, n_tokens)
        self._limit = max(1, min(self._limit, n_tokens // 2))
        self._streak = 0
        self._proven = self._proven if self._proven < n_tokens else 0
        self._is_recalled = False
        self._search.stop()

    def keep_below(self, n_tokens: int) -> None:
        """There is memory for no more than so many padded tokens at the moment: no larger batch is tried.

        Thread-safe: assigns one int.
        """
        self._room = max(1, n_tokens)

    def _ceiling(self) -> int:
        """The largest limit that nothing known speaks against: at least 1."""
        ceiling = self._search.size
        if self.failed_at is not None:
            ceiling = min(ceiling, self.failed_at - 1)
        if self._killed_at is not None:
            ceiling = min(ceiling, self._killed_at // 2)
        return max(1, min(ceiling, self._room or ceiling))

    def _rise(self, highest: int) -> None:
        if self._is_recalled and self.failed_at is not None:
            return  # an earlier run has looked for the limit already: short jobs must not do it again and again
        ceiling = min(highest, self._ceiling())
        if self._limit >= ceiling or (self.failed_at is not None and ceiling - self._limit <= self._limit // 8):
            return
        halfway = (self._limit + ceiling + 1) // 2 if self.failed_at is not None else ceiling
        self._limit = min(2 * self._limit, halfway)


WITHOUT_PADDING = 1 << 16
"""A limit for a model that pads nothing and looks its vectors up: what counts is the number of calls."""


def initial_limit(device: str, slots: int = 1, *, pads: bool = True) -> int:
    """A first limit for a device, in padded tokens; on a CPU it stays the largest.

    On a CPU 1,024 where one batch has all cores, and 512 where several run at once, are within 3 % of the best, on
    long and on short texts, in float32 and bfloat16; half or twice as much loses up to 12 % (all-MiniLM-L6-v2 on
    torch and OpenVINO, two cores). A GPU wants tens of thousands.
    """
    if not pads:
        return WITHOUT_PADDING
    if not device.startswith("cpu"):
        return 16_384
    return 1024 if slots <= 2 else 512  # of several slots one waits behind the others


def estimator_for(
    device: str,
    token_limit: int | None = None,
    *,
    learnt: LearntLimit | None = None,
    slots: int = 1,
    pads: bool = True,
) -> TokenLimitEstimator:
    """The estimator of a job on a device, where the model has `slots` batches under way at once.

    A limit of the user's own is not exceeded. Without one, `learnt` comes before the device's, and a GPU's
    fastest size is searched for.
    """
    if token_limit is not None:
        return TokenLimitEstimator(token_limit, min_limit=min(128, token_limit))
    start, on_gpu = initial_limit(device, slots, pads=pads), not device.startswith("cpu")
    largest = 16 * start if on_gpu else start
    return TokenLimitEstimator(start, min_limit=128, max_limit=largest, learnt=learnt, tunes_speed=on_gpu)
