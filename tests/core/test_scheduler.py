"""The scheduler by itself: whatever fails, every chunk has one end, and a broken model is told from bad texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.encoders.failures import FailureKind
from asyncembed.errors import ModelError
from asyncembed.heap import ChunkHeap
from asyncembed.limits import TokenLimitEstimator
from asyncembed.records import Batch, Chunk
from asyncembed.scheduler import BROKEN_AFTER, Scheduler

from .fakes import chunk, chunks

Failure = Callable[[Batch], FailureKind | None]


def scheduler_of(items: list[Chunk], limit: int = 1000) -> Scheduler:
    heap = ChunkHeap()
    heap.push(items)
    return Scheduler(heap, TokenLimitEstimator(limit), max_rows=None, is_wanted=lambda _: True)


def run(scheduler: Scheduler, failure_of: Failure) -> tuple[Counter[int], dict[int, str]]:
    """Run all that waits: how often each text was embedded, and why others were given up."""
    embedded: Counter[int] = Counter()
    failed: dict[int, str] = {}
    while (batch := scheduler.next_batch()) is not None:
        kind = failure_of(batch)
        if kind is None:
            if scheduler.succeeded(batch):
                embedded.update(item.owner for item in batch.chunks)
        elif (given_up := scheduler.failed(batch, kind, ValueError("bad row"))) is not None:
            assert given_up.chunk.owner not in failed
            failed[given_up.chunk.owner] = given_up.reason
    assert not scheduler
    return embedded, failed


def fails_on(bad: set[int], capacity: int = 1 << 30) -> Failure:
    def kind_of(batch: Batch) -> FailureKind | None:
        if batch.padded_tokens > capacity:
            return FailureKind.OUT_OF_MEMORY
        return FailureKind.OTHER if bad & {item.owner for item in batch.chunks} else None

    return kind_of


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    capacity=st.integers(1, 200),
    limit=st.integers(1, 300),
    bad=st.sets(st.integers(0, 119), max_size=BROKEN_AFTER - 1),
)
def test_next_batch_any_mix_of_failures_gives_every_chunk_one_end(
    lengths: list[int], capacity: int, limit: int, bad: set[int]
) -> None:
    items = chunks(lengths)
    embedded, failed = run(scheduler_of(items, limit), fails_on(bad, capacity))
    given_up = {item.owner for item in items if item.length > capacity or item.owner in bad}
    assert set(failed) == given_up
    assert embedded == Counter(item.owner for item in items if item.owner not in given_up)


def test_failed_bad_texts_in_a_row_are_told_from_a_broken_model_by_a_chunk_that_passed() -> None:
    bad = set(range(1, 3 * BROKEN_AFTER))
    items = [chunk(90, owner=0), *(chunk(10, owner=owner) for owner in sorted(bad))]
    embedded, failed = run(scheduler_of(items, limit=90), fails_on(bad))
    assert embedded == Counter([0])
    assert set(failed) == bad


def test_failed_chunk_that_passed_before_fails_too_and_the_model_is_broken() -> None:
    items = [chunk(90, owner=0), *(chunk(10, owner=owner) for owner in range(1, 100))]
    scheduler, n_batches = scheduler_of(items, limit=90), 0

    def kind_of(_: Batch) -> FailureKind | None:
        nonlocal n_batches
        n_batches += 1
        return FailureKind.OTHER if n_batches > 1 else None

    with pytest.raises(ModelError, match=rf"failed on {BROKEN_AFTER} chunks in a row.*bad row"):
        run(scheduler, kind_of)


def test_put_back_part_of_a_failed_batch_is_not_mixed_with_what_waits() -> None:
    scheduler = scheduler_of(chunks([10] * 4), limit=40)
    batch = scheduler.next_batch()
    assert batch is not None
    assert len(batch.chunks) == 4
    assert scheduler.failed(batch, FailureKind.OTHER, ValueError()) is None
    half = scheduler.next_batch()
    assert half is not None
    scheduler.put_back(half)
    assert scheduler.next_batch() == half
