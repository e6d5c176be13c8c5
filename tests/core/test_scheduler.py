"""The scheduler by itself: whatever fails, every chunk has one end, and a broken model is told from bad texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.encoders.failures import FailureKind
from asyncembed.engine.limits import TokenLimitEstimator
from asyncembed.engine.scheduler import BROKEN_AFTER, EncoderState, Scheduler
from asyncembed.engine.work import Client, Work
from asyncembed.errors import ModelError
from asyncembed.records import Batch

from .fakes import owners, vector_of, work, works

Failure = Callable[[Batch], FailureKind | None]


def scheduler_of(items: list[Work]) -> Scheduler:
    scheduler, client = Scheduler(), Client()
    for item in items:
        item.client = client
    scheduler.push(items)
    return scheduler


def run(scheduler: Scheduler, failure_of: Failure, *limits: int) -> tuple[Counter[int], dict[int, str]]:
    """Runs all that waits, on encoders that take turns: how often each text was done, and why others were given up."""
    done: list[Work] = []
    for encoder in cycle([EncoderState(TokenLimitEstimator(limit)) for limit in limits or (1000,)]):
        batch = scheduler.next_batch(encoder)
        if batch is None:
            break
        assert len(batch.chunks) == 1 or batch.padded_tokens <= encoder.limit
        kind = failure_of(batch)
        if kind is None:
            done += scheduler.succeeded(encoder, batch, np.stack([vector_of(item) for item in batch.chunks]))
        else:
            done += scheduler.failed(encoder, batch, kind, ValueError("bad row"))
    assert not scheduler
    failed = {int(str(item.text)): item.error for item in done if item.error is not None}
    assert len(failed) == sum(item.error is not None for item in done)
    return Counter(int(str(item.text)) for item in done if item.error is None), failed


def fails_on(bad: set[int], capacity: int = 1 << 30) -> Failure:
    def kind_of(batch: Batch) -> FailureKind | None:
        if batch.padded_tokens > capacity:
            return FailureKind.OUT_OF_MEMORY
        return FailureKind.OTHER if bad & owners(batch) else None

    return kind_of


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    capacity=st.integers(1, 200),
    limits=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    bad=st.sets(st.integers(0, 119), max_size=BROKEN_AFTER - 1),
)
def test_next_batch_any_mix_of_failures_gives_every_chunk_one_end(
    lengths: list[int], capacity: int, limits: list[int], bad: set[int]
) -> None:
    embedded, failed = run(scheduler_of(works(lengths)), fails_on(bad, capacity), *limits)
    given_up = {owner for owner, length in enumerate(lengths) if length > capacity or owner in bad}
    assert set(failed) == given_up
    assert embedded == Counter(owner for owner in range(len(lengths)) if owner not in given_up)


def test_failed_bad_texts_in_a_row_are_told_from_a_broken_model_by_a_chunk_that_passed() -> None:
    bad = set(range(1, 3 * BROKEN_AFTER))
    items = [work(90, owner=0), *(work(10, owner=owner) for owner in sorted(bad))]
    embedded, failed = run(scheduler_of(items), fails_on(bad), 90)
    assert embedded == Counter([0])
    assert set(failed) == bad


def test_failed_chunk_that_passed_before_fails_too_and_the_model_is_broken() -> None:
    items = [work(90, owner=0), *(work(10, owner=owner) for owner in range(1, 100))]
    scheduler, n_batches = scheduler_of(items), 0

    def kind_of(_: Batch) -> FailureKind | None:
        nonlocal n_batches
        n_batches += 1
        return FailureKind.OTHER if n_batches > 1 else None

    with pytest.raises(ModelError, match=rf"failed on {BROKEN_AFTER} chunks in a row.*bad row"):
        run(scheduler, kind_of, 90)


@pytest.mark.parametrize(
    ("is_interactive", "n_texts", "expected"), [(False, 8, True), (False, 7, False), (True, 8, False)]
)
def test_may_choose_ahead_only_where_several_batches_wait_and_nobody_for_an_answer(
    is_interactive: bool, n_texts: int, expected: bool
) -> None:
    scheduler = Scheduler(is_interactive=is_interactive)
    scheduler.push(works([10] * n_texts))
    assert scheduler.may_choose_ahead(EncoderState(TokenLimitEstimator(40))) is expected
    assert scheduler.may_choose_ahead(EncoderState(TokenLimitEstimator(400), max_rows=4)) is expected


@pytest.mark.parametrize("way", ["dropped", "stopped"])
def test_second_chance_of_a_text_that_nobody_wants_any_more_is_forgotten(way: str) -> None:
    scheduler, encoder, text = Scheduler(), EncoderState(TokenLimitEstimator(40)), work(10)
    scheduler.push([text])
    batch = scheduler.next_batch(encoder)
    assert batch is not None
    scheduler.failed(encoder, batch, FailureKind.OUT_OF_MEMORY, MemoryError())
    assert scheduler.next_batch(encoder) is not None  # on its way to the model, and taken back before it begins
    if way == "dropped":
        scheduler.drop([text])
    else:
        scheduler.stop(text.client)
    assert not scheduler._second_chance
