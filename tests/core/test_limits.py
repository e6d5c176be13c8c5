"""The limit of a batch: learned from failures, never at a size known to fail, and never lost for good."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncembed.engine.limits import (
    DEFAULT_INITIAL_LIMIT,
    SMALLEST_PART,
    SUCCESSES_TO_FORGET,
    SUCCESSES_TO_RISE,
    LearntLimit,
    TokenLimitEstimator,
    initial_limit,
)

_sizes = st.integers(1, 100_000)


class AnyHistory(RuleBasedStateMachine):
    @initialize(maximum=st.none() | st.integers(16, 50_000), data=st.data())
    def begin(self, maximum: int | None, data: st.DataObject) -> None:
        initial = data.draw(st.none() | st.integers(1, maximum or 50_000))
        self.maximum = maximum
        self.estimator = TokenLimitEstimator(initial, max_limit=maximum, tunes_speed=data.draw(st.booleans()))
        if initial is not None:
            assert self.estimator() == initial

    @rule(n_tokens=_sizes, times=st.integers(1, 40))
    def succeed(self, n_tokens: int, times: int) -> None:
        for _ in range(times):
            self.estimator.succeed(n_tokens)

    @rule(times=st.integers(1, 600), seconds=st.one_of(st.none(), st.floats(0.01, 1.0)))
    def succeed_at_the_limit(self, times: int, seconds: float | None) -> None:
        for _ in range(times):
            before = self.estimator()
            self.estimator.succeed(before, seconds)
            assert self.estimator() >= before or seconds is not None  # only speed can lower it

    @rule(n_tokens=_sizes)
    def fail(self, n_tokens: int) -> None:
        before = self.estimator()
        self.estimator.fail(n_tokens)
        assert self.estimator() < n_tokens or n_tokens == 1
        assert self.estimator() <= before

    @rule()
    def fail_at_the_limit(self) -> None:
        self.fail(self.estimator())

    @invariant()
    def stays_within_bounds(self) -> None:
        if hasattr(self, "estimator"):
            assert self.estimator() >= 1
            assert self.maximum is None or self.estimator() <= self.maximum

    @invariant()
    def stays_below_what_failed(self) -> None:
        if hasattr(self, "estimator") and self.estimator.failed_at is not None and self.estimator.failed_at > 1:
            assert self.estimator() < self.estimator.failed_at


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


def work(estimator: TokenLimitEstimator, capacity: Callable[[], int], batches: int) -> int:
    """Run full batches on a device of some capacity; how many failed."""
    failures = 0
    for _ in range(batches):
        n_tokens = estimator()
        if n_tokens > capacity():
            failures += 1
            estimator.fail(n_tokens)
        else:
            estimator.succeed(n_tokens)
    return failures


def is_settled_below(limit: int, capacity: int) -> bool:
    """Not above the capacity, and an eighth below it at most (and one token for rounding)."""
    return limit <= capacity <= limit + limit // 8 + 1


@settings(deadline=None)
@given(initial=st.integers(2, 1_000_000), fraction=st.floats(0.0001, 0.9999))
def test_estimator_fixed_capacity_settles_just_below_it(initial: int, fraction: float) -> None:
    capacity = max(1, int(initial * fraction))
    estimator = TokenLimitEstimator(initial)
    failures = work(estimator, lambda: capacity, 300)
    assert is_settled_below(estimator(), capacity)
    assert failures <= math.log2(initial / capacity) + 6  # halving down to it, then bisecting to an eighth
    assert work(estimator, lambda: capacity, SUCCESSES_TO_FORGET - 300 - 1) == 0


@settings(deadline=None, max_examples=30)
@given(first=st.integers(64, 100_000), share=st.floats(0.01, 0.9))
def test_estimator_capacity_shrinks_mid_run_settles_again(first: int, share: float) -> None:
    second = max(2, int(first * share))
    estimator = TokenLimitEstimator(2 * first)
    work(estimator, lambda: first, 200)
    failures = work(estimator, lambda: second, 300)
    assert is_settled_below(estimator(), second)
    assert failures <= math.log2(first / second) + 8


@settings(deadline=None, max_examples=30)
@given(first=st.integers(32, 2_000), times=st.integers(2, 16))
def test_estimator_capacity_grows_recovers_after_the_failure_is_doubted(first: int, times: int) -> None:
    second = first * times
    estimator = TokenLimitEstimator(second)
    work(estimator, lambda: first, 300)
    assert is_settled_below(estimator(), first)
    doublings = math.ceil(math.log2(times)) + 2
    failures = work(estimator, lambda: second, SUCCESSES_TO_FORGET + doublings * SUCCESSES_TO_RISE)
    assert failures == 0
    assert estimator() == second


def test_estimator_capacity_stays_doubt_costs_few_failures() -> None:
    estimator = TokenLimitEstimator(8192)
    assert work(estimator, lambda: 1000, 20_000) <= 20_000 / SUCCESSES_TO_FORGET * 6


def test_estimator_small_batches_say_nothing_about_the_limit() -> None:
    estimator = TokenLimitEstimator(1000)
    estimator.fail(1000)
    for _ in range(10 * SUCCESSES_TO_FORGET):
        estimator.succeed(estimator() // SMALLEST_PART - 1)
    assert estimator() == 500
    assert estimator.failed_at == 1000


def test_estimator_success_at_a_size_that_failed_forgives_it() -> None:
    estimator = TokenLimitEstimator(1000)
    estimator.fail(1000)
    estimator.succeed(1000)
    assert estimator.failed_at is None


@pytest.mark.parametrize("given_limit", [1, 7, 100_000])
def test_estimator_initial_limit_is_tried_as_given(given_limit: int) -> None:
    assert TokenLimitEstimator(given_limit)() == given_limit


def test_estimator_default_limit_stays_within_its_bounds() -> None:
    assert TokenLimitEstimator()() == DEFAULT_INITIAL_LIMIT
    assert TokenLimitEstimator(max_limit=100)() == 100
    assert TokenLimitEstimator(min_limit=5000)() == 5000


def test_estimator_with_room_above_rises_to_max_limit() -> None:
    estimator = TokenLimitEstimator(64, max_limit=1000)
    assert work(estimator, lambda: 10**9, 5 * SUCCESSES_TO_RISE) == 0
    assert estimator() == 1000


@pytest.mark.parametrize(
    "arguments",
    [
        {"initial_limit": 0},
        {"initial_limit": -5},
        {"min_limit": 0},
        {"min_limit": 100, "max_limit": 99},
        {"initial_limit": 101, "max_limit": 100},
    ],
)
def test_estimator_impossible_arguments_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="limit"):
        TokenLimitEstimator(**arguments)


def test_initial_limit_is_larger_on_a_gpu() -> None:
    assert initial_limit("cpu", slots=3) < initial_limit("cpu") < initial_limit("cuda:0")


def test_learnt_limit_that_has_just_risen_is_not_called_proven() -> None:
    estimator = TokenLimitEstimator(1000)
    estimator.fail(1000)
    for _ in range(SUCCESSES_TO_RISE):
        estimator.succeed(500)
    assert estimator() == 750
    assert estimator.learnt().limit == 500


def test_learnt_limit_is_kept_until_the_failure_is_doubted_or_repeated() -> None:
    estimator = TokenLimitEstimator(1024, max_limit=2000, learnt=LearntLimit(limit=500, failed_at=1000))
    assert work(estimator, lambda: 500, SUCCESSES_TO_FORGET - 1) == 0
    assert estimator() == 500
    again = TokenLimitEstimator(1024, max_limit=2000, learnt=LearntLimit(limit=500, failed_at=1000))
    assert work(again, lambda: 300, 300) > 0
    assert is_settled_below(again(), 300)


@given(known=st.builds(LearntLimit, limit=_sizes, failed_at=st.none() | _sizes, fastest=st.none() | _sizes), n=_sizes)
def test_learnt_after_a_kill_is_at_most_half_of_it(known: LearntLimit, n: int) -> None:
    after = known.after_kill(n)
    limit = TokenLimitEstimator(1024, max_limit=8192, learnt=after)
    assert limit() <= max(1, n // 2)
    for _ in range(100):
        limit.succeed(limit(), 1.0)
        assert limit() <= max(1, n // 2)
    assert after.after_kill(n) == after
