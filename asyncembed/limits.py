"""Learn how many tokens a batch may have, from success, failure and speed: pure, no clock, no device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, log, sqrt
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

    Speed is learned by trying larger and smaller sizes on the first batches, where their seconds are given; see
    `tuning`. Memory has the last word.

    A replacement needs the same three methods: call, `succeed`, `fail`.

    Args:
        initial_limit: The first limit, tried as given. None takes 2,048 (within `max_limit`).
        min_limit: Tuning never goes below this. A failure may.
        max_limit: The limit never passes this; None takes the start: it recovers from failures and grows no further.
        learnt: What an earlier run learnt on this machine; its limit comes before `initial_limit`.
        slots: Batches that the model has under way at once.

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
        slots: int = 1,
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
        start = start if initial_limit is not None else min(max(start, min_limit), self.max_limit)
        known = learnt if learnt is not None else LearntLimit(limit=start)
        self._failed_at, self._killed_at = known.failed_at, known.killed_at
        self._streak = known.successes
        self._room: int | None = None
        self._proven = 0
        self._is_timed = False
        self._is_recalled = known.failed_at is not None
        self._knows_speed = known.fastest is not None
        tuned = min(known.fastest if known.fastest is not None else start, self.max_limit)
        # A size that failed, or was killed for, ends the search for speed: it would lead back there.
        settled = known.failed_at is not None or known.killed_at is not None or (self._knows_speed and not known.is_old)
        self._tuner = SpeedTuner(tuned, min(min_limit, tuned), self.max_limit, slots=slots, settled=settled)
        self._limit = start
        if learnt is not None:
            self._limit = max(1, min(known.limit, self._ceiling()))

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
        tuner = self._tuner
        limit = self._limit if tuner.is_settled else max(1, min(tuner.best, self._ceiling()))
        if self._failed_at is not None:  # a limit that has just risen may never have been used
            limit = max(1, min(limit, max(self._proven, self._failed_at // 2)))
        return LearntLimit(
            limit=limit,
            failed_at=self._failed_at,
            killed_at=self._killed_at,
            fastest=tuner.best if self._knows_speed or (tuner.is_settled and tuner.has_measured) else None,
            successes=self._streak,
            is_old=self._knows_speed and not tuner.is_settled,
        )

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """A batch of `n_tokens` padded tokens ran, in `seconds` where they were measured.

        Infinite seconds are those of a batch that was cut for less than the limit: its speed says nothing.
        """
        if self._failed_at is not None and n_tokens >= self._failed_at:
            self._failed_at = None
        self._proven = max(self._proven, n_tokens)
        if seconds is not None and not self._tuner.is_settled:
            self._is_timed = self._is_timed or seconds > 0
            if seconds != inf:
                self._tuner.add(n_tokens, seconds)
            self._limit = min(self._tuner.size, self._ceiling())
        if SMALLEST_PART * n_tokens < self._limit:
            return  # says nothing about the limit
        self._streak += 1
        if self._failed_at is not None and self._streak >= SUCCESSES_TO_FORGET:
            self._failed_at = None
        if self._streak % SUCCESSES_TO_RISE == 0:
            self._rise()

    def fail(self, n_tokens: int) -> None:
        """A batch of `n_tokens` padded tokens ran out of memory: the limit falls below it."""
        self._failed_at = n_tokens if self._failed_at is None else min(self._failed_at, n_tokens)
        self._limit = max(1, min(self._limit, n_tokens // 2))
        self._streak = 0
        self._proven = self._proven if self._proven < n_tokens else 0
        self._is_recalled = False
        self._tuner.settle()

    def keep_below(self, n_tokens: int) -> None:
        """There is memory for no more than so many padded tokens at the moment: no larger batch is tried.

        May be called from another thread than the rest: it sets a number, which the next batch heeds.
        """
        self._room = max(1, n_tokens)
        self._limit = min(self._limit, self._room)

    def _ceiling(self) -> int:
        """The largest limit that nothing known speaks against: at least 1."""
        ceiling = self.max_limit
        if self._is_timed or self._knows_speed:
            ceiling = min(ceiling, self._tuner.size)
        if self._failed_at is not None:
            ceiling = min(ceiling, self._failed_at - 1)
        if self._killed_at is not None:
            ceiling = min(ceiling, self._killed_at // 2)
        if self._room is not None:
            ceiling = min(ceiling, self._room)
        return max(1, ceiling)

    def _rise(self) -> None:
        if self._is_recalled and self._failed_at is not None:
            return  # an earlier run has looked for the limit already: short jobs must not do it again and again
        ceiling = self._ceiling()
        if self._limit >= ceiling or (self._failed_at is not None and ceiling - self._limit <= self._limit // 8):
            return
        doubled = 2 * self._limit
        self._limit = min(doubled, (self._limit + ceiling + 1) // 2 if self._failed_at is not None else ceiling)


def initial_limit(device: str, slots: int = 1) -> int:
    """A first limit for a device, in padded tokens.

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
    """The estimator of a job.

    Args:
        device: Where the model runs.
        token_limit: The user's own first limit; None for what was learnt, or the device's.
        learnt: What an earlier run learnt on this machine; unused if the user chose.
        slots: Batches that the model has under way at once.
    """
    start = token_limit if token_limit is not None else initial_limit(device, slots)
    # On a CPU more was never seen to be faster, and 8,192 tokens of a small model take a quarter of a gigabyte.
    largest = 4096 if device.startswith("cpu") else 16 * initial_limit(device)
    return TokenLimitEstimator(
        start,
        min_limit=min(128, start),
        max_limit=max(start, largest),
        learnt=learnt if token_limit is None else None,
        slots=slots,
    )
