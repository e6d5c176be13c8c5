"""The search finds the size that gives the most tokens per second, and stays."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.engine.limits import LearntLimit, SpeedSearch, TokenLimitEstimator, estimator_for


def rate(size: int, best: int, slope: float) -> float:
    """Tokens per second of a device that is fastest at `best` and loses `slope` of it for each doubling away."""
    return 1000.0 * (1 - slope) ** abs(math.log2(size / best))


def tune(search: SpeedSearch, best: int, slope: float, noise: float, seed: int) -> int:
    """Feed full batches until it settles; how many it took."""
    rng = random.Random(seed)
    for number in range(1000):
        if search.is_over:
            return number
        n_tokens = int(search.size * rng.uniform(0.8, 1.0))
        seconds = n_tokens / rate(search.size, best, slope) * rng.uniform(1 - noise, 1 + noise)
        search.add(n_tokens, seconds)
    raise AssertionError("it never ended")


@settings(deadline=None)
@given(
    start=st.sampled_from([256, 1024, 4096]),
    best=st.sampled_from([128, 512, 1024, 2048, 8192]),
    slope=st.floats(0.08, 0.4),
    seed=st.integers(0, 1000),
)
def test_search_ends_within_ten_percent_of_the_best_size(start: int, best: int, slope: float, seed: int) -> None:
    search = SpeedSearch(start, 64, 16_384)
    n_batches = tune(search, best, slope, 0.01, seed)
    assert rate(search.size, best, slope) >= 0.9 * rate(best, best, slope)
    assert n_batches <= 8 * 2 * 4  # a step takes three pairs and the batch that began it


def drifting(rng: random.Random, noise: float) -> Iterator[float]:
    """Factors that a shared machine puts on the seconds of its batches: noise, slow drift, now and then a hiccup."""
    drift = 0.0
    while True:
        drift = 0.9 * drift + rng.gauss(0, 0.3 * noise)
        yield math.exp(rng.gauss(0, noise) + drift) * (2 if rng.random() < 0.03 else 1)


def tune_on_a_shared_machine(best: int, slope: float, noise: float, seed: int, slots: int) -> int:
    """The size that a search ends with: what it asks for comes back some batches later."""
    search, rng = SpeedSearch(1024, 128, 8192), random.Random(seed)
    factors, waiting = drifting(rng, noise), deque[int]()
    for _ in range(300):
        waiting.append(search.size)
        if len(waiting) > slots + 1:
            size = waiting.popleft()
            n_tokens = int(size * rng.uniform(0.85, 1.0))
            search.add(n_tokens, n_tokens / rate(size, best, slope) * next(factors))
    assert search.is_over
    return search.best


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
def test_search_on_a_noisy_machine_seldom_ends_ten_percent_off(
    best: int, slope: float, noise: float, allowed: float, slots: int
) -> None:
    ends = [tune_on_a_shared_machine(best, slope, noise, seed, slots) for seed in range(100)]
    off = sum(rate(size, best, slope) < 0.9 * rate(best, best, slope) for size in ends)
    assert off / len(ends) <= allowed


def test_search_of_sizes_that_are_as_good_seldom_wanders_far() -> None:
    ends = [tune_on_a_shared_machine(1024, 0.0, 0.15, seed, 1) for seed in range(200)]
    assert sum(size == 1024 for size in ends) >= 100
    assert sum(not 512 <= size <= 2048 for size in ends) <= 30


def test_search_batches_that_never_fill_a_size_end_its_trial() -> None:
    search = SpeedSearch(1024, 64, 16_384)
    for _ in range(200):
        search.add(1000, 1.0)  # a cap on rows, say
    assert search.is_over
    assert search.size == 1024


@given(seed=st.integers(0, 1000), noise=st.floats(0, 0.9))
def test_search_ends_within_its_bounds_whatever_it_measures(seed: int, noise: float) -> None:
    search = SpeedSearch(1024, 256, 4096)
    tune(search, 1024, 0.0, noise, seed)
    assert search.size in (256, 512, 1024, 2048, 4096)


def test_search_prefers_the_smaller_of_two_that_are_as_good() -> None:
    search = SpeedSearch(1024, 64, 16_384)
    tune(search, 1024, 0.0, 0.0, 0)
    assert search.size <= 1024


def test_search_that_is_over_tries_nothing() -> None:
    search = SpeedSearch(1024, 64, 16_384)
    tune(search, 2048, 0.2, 0.0, 0)
    before = search.size
    for _ in range(100):
        search.add(before, 100.0)
    assert search.size == before == 2048


def test_search_counts_neither_the_first_batch_of_a_size_nor_small_ones() -> None:
    search = SpeedSearch(1024, 64, 16_384)
    for _ in range(50):
        search.add(100, 1.0)  # an app may make small batches for ever
    assert not search.has_measured
    assert search.size == 1024
    search.add(1024, 1000.0)
    assert search.size == 2048  # takes turns with it now
    search.add(2048, 100_000.0)
    while not search.is_over:
        search.add(search.size, 1.0)
    assert search.size == 16_384  # the more tokens in a second, the better


@pytest.mark.parametrize("n_batches", [0, 5, 100])
def test_limit_that_is_copied_goes_on_from_the_best_size_so_far(n_batches: int) -> None:
    limit = estimator_for("cuda:0")
    for _ in range(n_batches):
        limit.succeed(limit(), max(limit(), 65_536) / 1000)
    for copied in (copy.deepcopy(limit), pickle.loads(pickle.dumps(limit))):
        assert copied() == limit()
        for _ in range(100):
            copied.succeed(copied(), max(copied(), 65_536) / 1000)
        assert copied() == 65_536


def test_limit_follows_speed_and_memory_has_the_last_word() -> None:
    limit = TokenLimitEstimator(1024, max_limit=16_384, tunes_speed=True)
    for _ in range(200):
        n_tokens = limit()
        if n_tokens > 5000:
            limit.fail(n_tokens)
        else:
            limit.succeed(n_tokens, n_tokens / rate(n_tokens, 16_384, 0.2))
    assert 3000 < limit() <= 5000


def test_limit_failure_ends_the_search_and_the_best_size_so_far_is_learnt() -> None:
    limit = TokenLimitEstimator(1024, max_limit=16_384, tunes_speed=True)
    while limit() < 4096:
        limit.succeed(limit(), 1.0)
    limit.fail(4096)
    assert limit.learnt() == LearntLimit(limit=2048, failed_at=4096, fastest=2048)
    for _ in range(100):
        limit.succeed(limit(), 1.0)
    assert limit() == 2048


@pytest.mark.parametrize("seconds", [None, 0.0, 1.0])
def test_limit_without_a_search_is_a_matter_of_memory_alone(seconds: float | None) -> None:
    limit = TokenLimitEstimator(1024, max_limit=2048, learnt=LearntLimit(limit=1024, fastest=512))
    assert limit() == 1024
    for _ in range(8):
        limit.succeed(1024, seconds)
    assert limit() == 2048
    assert limit.learnt().fastest is None


@pytest.mark.parametrize("tunes_speed", [False, True])
def test_limit_of_small_batches_alone_stays_and_finds_its_way_back_after_a_failure(tunes_speed: bool) -> None:
    limit = TokenLimitEstimator(1024, max_limit=16_384, tunes_speed=tunes_speed)
    for _ in range(100):
        limit.succeed(limit() // 4)  # callers in an app: their batches are a quarter
    assert limit() == 1024
    limit.fail(256)
    assert limit() == 128
    for _ in range(1000):
        limit.succeed(limit() // 4)
    assert limit() == 1024


@pytest.mark.parametrize(("device", "token_limit"), [("cpu", None), ("cpu", 300), ("cuda:0", 300)])
def test_estimator_for_a_cpu_or_with_a_limit_of_the_users_own_tries_no_other_size(
    device: str, token_limit: int | None
) -> None:
    limit = estimator_for(device, token_limit)
    assert limit() == (token_limit or 1024)
    for _ in range(100):
        limit.succeed(limit(), 1.0)
        assert limit() == (token_limit or 1024)


def test_estimator_for_a_gpu_tries_others() -> None:
    limit, sizes = estimator_for("cuda:0"), set()
    for _ in range(100):
        sizes.add(limit())
        limit.succeed(limit(), 1.0)
    assert sizes == {1 << power for power in range(14, 19)}
