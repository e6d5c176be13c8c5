"""The tuner finds the size that gives the most tokens per second, and stays."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.limits import SpeedTuner, TokenLimitEstimator


def rate(size: int, best: int, slope: float) -> float:
    """Tokens per second of a device that is fastest at `best` and loses `slope` of it for each doubling away."""
    return 1000.0 * (1 - slope) ** abs(math.log2(size / best))


def tune(tuner: SpeedTuner, best: int, slope: float, noise: float, seed: int) -> int:
    """Feed full batches until it settles; how many it took."""
    rng = random.Random(seed)
    for number in range(1000):
        if tuner.is_settled:
            return number
        n_tokens = int(tuner.size * rng.uniform(0.8, 1.0))
        seconds = n_tokens / rate(tuner.size, best, slope) * rng.uniform(1 - noise, 1 + noise)
        tuner.add(n_tokens, seconds)
    raise AssertionError("it never settled")


@settings(deadline=None)
@given(
    start=st.sampled_from([256, 1024, 4096]),
    best=st.sampled_from([128, 512, 1024, 2048, 8192]),
    slope=st.floats(0.08, 0.4),
    seed=st.integers(0, 1000),
)
def test_tuner_ends_within_ten_percent_of_the_best_size(start: int, best: int, slope: float, seed: int) -> None:
    tuner = SpeedTuner(start, 64, 16_384)
    n_batches = tune(tuner, best, slope, 0.01, seed)
    assert rate(tuner.size, best, slope) >= 0.9 * rate(best, best, slope)
    assert n_batches <= 8 * 2 * 4  # a step takes three pairs and the batch that began it


def drifting(rng: random.Random, noise: float) -> Iterator[float]:
    """Factors that a shared machine puts on the seconds of its batches: noise, slow drift, now and then a hiccup."""
    drift = 0.0
    while True:
        drift = 0.9 * drift + rng.gauss(0, 0.3 * noise)
        yield math.exp(rng.gauss(0, noise) + drift) * (2 if rng.random() < 0.03 else 1)


def tune_on_a_shared_machine(best: int, slope: float, noise: float, seed: int, slots: int) -> int:
    """The size that a tuner ends with: what it asks for comes back some batches later."""
    tuner, rng = SpeedTuner(1024, 128, 8192, slots=slots), random.Random(seed)
    factors, waiting = drifting(rng, noise), deque[int]()
    for _ in range(300):
        waiting.append(tuner.size)
        if len(waiting) > slots + 1:
            size = waiting.popleft()
            n_tokens = int(size * rng.uniform(0.85, 1.0))
            tuner.add(n_tokens, n_tokens / rate(size, best, slope) * next(factors))
    assert tuner.is_settled
    return tuner.best


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    ("best", "slope", "noise", "allowed"),
    [
        (1024, 0.0, 0.15, 0.0),  # as flat as it is on a CPU from 256 to 2,048: wherever it ends is good
        (1024, 0.05, 0.15, 0.03),
        (1024, 0.10, 0.15, 0.03),
        (2048, 0.12, 0.03, 0.10),
        (4096, 0.15, 0.03, 0.10),
        (8192, 0.20, 0.03, 0.10),
        (512, 0.12, 0.03, 0.10),
    ],
)
def test_tuner_on_a_noisy_machine_seldom_ends_ten_percent_off(
    best: int, slope: float, noise: float, allowed: float, slots: int
) -> None:
    ends = [tune_on_a_shared_machine(best, slope, noise, seed, slots) for seed in range(100)]
    off = sum(rate(size, best, slope) < 0.9 * rate(best, best, slope) for size in ends)
    assert off / len(ends) <= allowed


def tune_on_two_streams(best: int, slope: float, noise: float, seed: int) -> int:
    """The size that a tuner ends with where two batches run at once, a third one waits behind them, and they are
    finished in the order in which they began, as with OpenVINO on two cores."""
    slots, n_streams = 3, 2
    tuner, rng = SpeedTuner(512, 128, 4096, slots=slots), random.Random(seed)
    factors, under_way = drifting(rng, noise), deque[tuple[int, float, float]]()
    free_at, asked, now, last_end = [0.0] * n_streams, tuner.size, 0.0, 0.0
    for _ in range(2000):
        size, asked = asked, tuner.size  # one batch is prepared ahead
        n_tokens = int(size * rng.uniform(0.51, 1.0)) + 1
        stream = free_at.index(min(free_at))
        began = max(free_at[stream], now)
        free_at[stream] = began + n_streams * n_tokens / rate(size, best, slope) * next(factors)
        under_way.append((n_tokens, began, free_at[stream]))
        if len(under_way) == slots:
            n_tokens, began, ended = under_way.popleft()
            now = max(now, ended)
            tuner.add(n_tokens, now - max(began, last_end))
            last_end = now
    assert tuner.is_settled
    return tuner.best


@pytest.mark.parametrize(("best", "slope", "allowed"), [(512, 0.12, 0.03), (4096, 0.20, 0.10)])
def test_tuner_of_batches_that_overlap_seldom_ends_ten_percent_off(best: int, slope: float, allowed: float) -> None:
    ends = [tune_on_two_streams(best, slope, 0.1, seed) for seed in range(60)]
    assert sum(rate(size, best, slope) < 0.9 * rate(best, best, slope) for size in ends) / len(ends) <= allowed


def test_tuner_of_batches_that_overlap_favours_neither_side() -> None:
    ends = [tune_on_two_streams(512, 0.0, 0.1, seed) for seed in range(80)]
    assert sum(size == 512 for size in ends) >= 40
    assert sum(size < 256 or size > 1024 for size in ends) <= 12


def test_tuner_of_sizes_that_are_as_good_seldom_wanders_far() -> None:
    ends = [tune_on_a_shared_machine(1024, 0.0, 0.15, seed, 1) for seed in range(200)]
    assert sum(size == 1024 for size in ends) >= 100
    assert sum(not 512 <= size <= 2048 for size in ends) <= 30


def test_tuner_settled_before_tries_nothing() -> None:
    tuner = SpeedTuner(2048, 64, 16_384, settled=True)
    for _ in range(100):
        tuner.add(2048, 1.0)
    assert tuner.size == 2048


def test_tuner_batches_that_never_fill_a_size_end_its_trial() -> None:
    tuner = SpeedTuner(1024, 64, 16_384)
    for _ in range(200):
        tuner.add(1000, 1.0)  # a cap on rows, say
    assert tuner.is_settled
    assert tuner.size == 1024


@given(seed=st.integers(0, 1000), noise=st.floats(0, 0.9))
def test_tuner_settles_within_its_bounds_whatever_it_measures(seed: int, noise: float) -> None:
    tuner = SpeedTuner(1024, 256, 4096)
    tune(tuner, 1024, 0.0, noise, seed)
    assert tuner.size in (256, 512, 1024, 2048, 4096)


def test_tuner_prefers_the_smaller_of_two_that_are_as_good() -> None:
    tuner = SpeedTuner(1024, 64, 16_384)
    tune(tuner, 1024, 0.0, 0.0, 0)
    assert tuner.size <= 1024


def test_tuner_stays_once_it_has_settled() -> None:
    tuner = SpeedTuner(1024, 64, 16_384)
    tune(tuner, 2048, 0.2, 0.0, 0)
    before = tuner.size
    for _ in range(100):
        tuner.add(before, 100.0)
    assert tuner.size == before == 2048


def test_tuner_counts_neither_first_batches_nor_small_ones() -> None:
    tuner = SpeedTuner(1024, 64, 16_384)
    for _ in range(50):
        tuner.add(100, 1.0)
    assert not tuner.has_measured
    assert tuner._open == (None, [])  # an app may make small batches for ever
    for _ in range(2):
        tuner.add(1024, 1000.0)
    assert tuner.size == 1024
    tuner.add(1024, 1.0)
    assert tuner.size == 2048  # takes turns with it now
    while not tuner.is_settled:
        tuner.add(tuner.size, 1.0)
    assert tuner.size == 16_384  # the more tokens in a second, the better


def test_limit_follows_speed_and_memory_has_the_last_word() -> None:
    limit = TokenLimitEstimator(1024, max_limit=16_384)
    for _ in range(200):
        n_tokens = limit()
        if n_tokens > 5000:
            limit.fail(n_tokens)
        else:
            limit.succeed(n_tokens, n_tokens / rate(n_tokens, 16_384, 0.2))
    assert 3000 < limit() <= 5000


def test_limit_given_by_the_user_is_tried_first() -> None:
    limit = TokenLimitEstimator(300, max_limit=16_384)
    assert limit() == 300
    limit.succeed(300, 1.0)
    assert limit() == 300


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_limit_without_measured_seconds_is_a_matter_of_memory_alone(seconds: float | None) -> None:
    limit = TokenLimitEstimator(1024, max_limit=2048)
    for _ in range(8):
        limit.succeed(1024, seconds)
    assert limit() == 2048


def test_limit_of_small_batches_alone_stays_and_finds_its_way_back_after_a_failure() -> None:
    limit = TokenLimitEstimator(1024, max_limit=16_384)
    for _ in range(100):
        limit.succeed(limit() // 4, math.inf)  # callers in an app: their batches are a quarter
    assert limit() == 1024
    limit.fail(256)
    assert limit() == 128
    for _ in range(1000):
        limit.succeed(limit() // 4, math.inf)
    assert limit() == 1024
