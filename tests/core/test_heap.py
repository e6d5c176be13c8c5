"""The choice of the next batch: never empty, never too large, never the same chunk twice, nobody forgotten."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncembed.engine.client import WINDOW_BATCHES, WINDOW_CHUNKS
from asyncembed.engine.heap import BATCH_OVERHEAD, BESIDE, FORCED_EVERY, best_run, last_run, shared_run
from asyncembed.engine.work import Client, Work
from asyncembed.records import Batch, Chunk

from .fakes import Heap, chunks, owner_of, owners, work, works

_lengths = st.integers(1, 300)
_limits = st.integers(1, 2000)
_rows = st.none() | st.integers(1, 40)


def check_size(batch: Batch, limit: int, max_rows: int | None) -> None:
    assert batch.chunks
    assert len(batch.chunks) == 1 or batch.padded_tokens <= limit
    assert max_rows is None or len(batch.chunks) <= max_rows


def drain(heap: Heap, limit: int, max_rows: int | None = None) -> list[Batch]:
    batches = []
    while (batch := heap.take(limit, max_rows)) is not None:
        check_size(batch, limit, max_rows)
        batches.append(batch)
    return batches


class HeapAgainstDict(RuleBasedStateMachine):
    """Whatever is done with the heap, it holds what a dictionary would."""

    @initialize(max_age=st.integers(1, 5), interactive_below=st.sampled_from([0, 2]))
    def begin(self, max_age: int, interactive_below: int) -> None:
        self.heap = Heap(max_age, interactive_below=interactive_below)
        self.waiting: dict[int, Chunk] = {}
        self.all: list[Work] = []
        self.out: list[Batch] = []

    @rule(rows=st.lists(st.tuples(_lengths, st.integers(0, 3), st.integers(0, 5)), max_size=30))
    def push(self, rows: list[tuple[int, int, int]]) -> None:
        pushed = [work(length, owner=owner, priority=priority) for length, priority, owner in rows]
        self.heap.push(pushed)
        self.all += pushed
        self.waiting.update({id(one.chunks[0]): one.chunks[0] for one in pushed})

    @rule(limit=_limits, max_rows=_rows, share=st.none() | st.integers(1, 500))
    def take(self, limit: int, max_rows: int | None, share: int | None) -> None:
        batch = self.heap.take(limit, max_rows, share=share)
        if not self.waiting:
            assert batch is None
            return
        assert batch is not None
        check_size(batch, limit if share is None else min(limit, share), max_rows)
        for item in batch.chunks:
            assert self.waiting.pop(id(item)) is item
        self.out.append(batch)

    @rule(owner=st.integers(0, 5))
    def discard(self, owner: int) -> None:
        gone = [key for key, item in self.waiting.items() if owner_of(item) == owner]
        assert self.heap.discard([one for one in self.all if one.text == str(owner)]) == len(gone)
        for key in gone:
            del self.waiting[key]

    @rule(owner=st.integers(0, 5))
    def hasten(self, owner: int) -> None:
        mine = [item for item in self.waiting.values() if owner_of(item) == owner]
        assert [self.heap.hasten(item.work) for item in mine] == [True] * len(mine)

    @rule()
    def drain(self) -> None:
        self.heap.client.is_draining = True

    @rule()
    def clear(self) -> None:
        self.heap.clear()
        self.waiting.clear()

    @invariant()
    def agrees(self) -> None:
        tokens = sum(item.length for item in self.waiting.values())
        assert len(self.heap) == len(self.waiting)
        assert self.heap.n_tokens == tokens

    def teardown(self) -> None:
        if hasattr(self, "heap"):
            rest = [item for batch in drain(self.heap, 500) for item in batch.chunks]
            assert Counter(map(id, rest)) == Counter(list(self.waiting))
            assert self.heap.n_tokens == 0


TestHeapAgainstDict = HeapAgainstDict.TestCase
TestHeapAgainstDict.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(lengths=st.lists(_lengths, min_size=1, max_size=200), limit=_limits, max_rows=_rows)
def test_take_until_empty_gives_every_chunk_once(lengths: list[int], limit: int, max_rows: int | None) -> None:
    heap, pushed = Heap(), works(lengths)
    heap.push(pushed)
    taken = [item for batch in drain(heap, limit, max_rows) for item in batch.chunks]
    assert Counter(map(id, taken)) == Counter(id(one.chunks[0]) for one in pushed)


def test_take_empty_heap_is_none() -> None:
    assert Heap().take(100) is None


def test_take_chunk_above_the_limit_goes_alone() -> None:
    heap = Heap()
    heap.push(works([50, 50, 3, 3]))
    assert sorted(len(batch.chunks) for batch in drain(heap, 10)) == [1, 1, 2]


# --- the best run ---


def worth(lengths: list[int], start: int, stop: int, limit: int, max_rows: int) -> float:
    """Useful tokens of a run over its cost: its padded tokens and the overhead of a batch of its longest row."""
    longest = lengths[stop - 1]
    overhead = BATCH_OVERHEAD * min(max(limit // longest, 1), max_rows)
    return sum(lengths[start:stop]) / (longest * (stop - start + overhead))


def is_allowed(lengths: list[int], start: int, stop: int, limit: int, max_rows: int) -> bool:
    rows = stop - start
    return rows <= max_rows and (rows == 1 or rows * lengths[stop - 1] <= limit)


_sorted_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=25).map(sorted)


@settings(deadline=None)
@given(lengths=_sorted_lengths, limit=st.integers(1, 400), max_rows=st.integers(1, 30), data=st.data())
def test_best_run_is_worth_as_much_as_the_best_of_all_full_runs(
    lengths: list[int], limit: int, max_rows: int, data: st.DataObject
) -> None:
    """Compared with every run that cannot be made longer downwards, found by trying."""
    forced = data.draw(st.none() | st.integers(0, len(lengths) - 1))
    every = []
    for stop in range(1, len(lengths) + 1):
        start = min(at for at in range(stop) if is_allowed(lengths, at, stop, limit, max_rows))
        if forced is None or start <= forced < stop:
            every.append(worth(lengths, start, stop, limit, max_rows))
    start, stop = best_run(np.array(lengths, np.int64), limit, max_rows, forced)
    assert is_allowed(lengths, start, stop, limit, max_rows)
    assert forced is None or start <= forced < stop
    assert worth(lengths, start, stop, limit, max_rows) == pytest.approx(max(every))


@settings(deadline=None)
@given(lengths=_sorted_lengths, limit=st.integers(1, 400), max_rows=st.integers(1, 30))
def test_last_run_is_worth_as_much_as_the_best_with_the_longest_row(
    lengths: list[int], limit: int, max_rows: int
) -> None:
    n = len(lengths)
    every = [
        worth(lengths, start, n, limit, max_rows)
        for start in range(n)
        if is_allowed(lengths, start, n, limit, max_rows)
    ]
    start, stop = last_run(np.array(lengths, np.int64), limit, max_rows)
    assert stop == n
    assert is_allowed(lengths, start, stop, limit, max_rows)
    assert worth(lengths, start, stop, limit, max_rows) == pytest.approx(max(every))


def cheapest(lengths: list[int], limit: int, max_rows: int) -> float:
    """What all rows cost in the best division into runs, found by trying every cut."""
    if not lengths:
        return 0.0
    return min(
        lengths[-1] * (len(lengths) - start) + BATCH_OVERHEAD * limit + cheapest(lengths[:start], limit, max_rows)
        for start in range(len(lengths))
        if is_allowed(lengths, start, len(lengths), limit, max_rows)
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9).map(sorted),
    limit=st.integers(1, 400),
    max_rows=st.integers(1, 10),
    data=st.data(),
)
def test_shared_run_is_a_part_of_the_cheapest_division(
    lengths: list[int], limit: int, max_rows: int, data: st.DataObject
) -> None:
    forced = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = shared_run(np.array(lengths, np.int64), limit, max_rows, forced)
    assert start <= forced < stop
    assert is_allowed(lengths, start, stop, limit, max_rows)
    own = lengths[stop - 1] * (stop - start) + BATCH_OVERHEAD * limit
    rest = cheapest(lengths[:start], limit, max_rows) + cheapest(lengths[stop:], limit, max_rows)
    assert own + rest == pytest.approx(cheapest(lengths, limit, max_rows))


# --- nobody starves ---


def longest_wait(rounds: list[list[tuple[int, int]]], window: int, limit: int, max_age: int) -> int:
    """Batches that any chunk waited, taken or not, when each round pushes what the window has room for."""
    heap, born, worst, n_batches = Heap(max_age), dict[int, int](), 0, 0
    kept: list[Work] = []
    for pushes in rounds:
        fresh = [work(length, priority=priority) for length, priority in pushes[: window - len(heap)]]
        kept += fresh
        heap.push(fresh)
        born.update({id(one.chunks[0]): n_batches for one in fresh})
        batch = heap.take(limit)
        if batch is not None:
            n_batches += 1
            worst = max([worst, *(n_batches - born.pop(id(item)) for item in batch.chunks)])
    return max([worst, *(n_batches - stamp for stamp in born.values())])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), limit=st.integers(1, 200), max_age=st.integers(1, 6), window=st.integers(1, 25))
def test_take_while_chunks_keep_arriving_every_wait_is_bounded(
    data: st.DataObject, limit: int, max_age: int, window: int
) -> None:
    """At most `max_age` batches for each class, and then one for each chunk that stood in the window before it; a class
    that is not the most urgent is given one batch in so many."""
    kinds = data.draw(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 2)), min_size=1, max_size=6))
    rounds = data.draw(st.lists(st.lists(st.sampled_from(kinds), max_size=30), min_size=20, max_size=120))
    n_classes = len({priority for _, priority in kinds})
    one_in = FORCED_EVERY if n_classes > 1 else 1
    assert longest_wait(rounds, window, limit, max_age) <= max_age * n_classes + one_in * (window + 1)


@pytest.mark.parametrize("flood", [(5, 0), (60, 0), (10, 1), (10, 0)], ids=["shorter", "longer", "later", "urgent"])
@pytest.mark.parametrize("priority", [0, 1])
def test_take_flood_of_others_odd_one_comes_out_in_time(flood: tuple[int, int], priority: int) -> None:
    """Full batches of the flood are worth more than the odd chunk alone, for ever: only its age brings it out."""
    max_age, window = 8, 40
    rounds = [[(37, priority)] + [flood] * window] + [[flood] * window] * 400
    assert longest_wait(rounds, window, 120, max_age) <= 2 * max_age + window


# --- priorities ---


@pytest.mark.parametrize("priority", [0, 5])
def test_hasten_text_is_in_the_next_batch(priority: int) -> None:
    heap = Heap()
    heap.push(works([20] * 50))
    odd = work(33, owner=77, priority=priority)
    heap.push([odd])
    heap.push(works([60] * 50))
    assert heap.hasten(odd)
    batch = heap.take(240)
    assert batch is not None
    assert 77 in owners(batch)
    check_size(batch, 240, None)


def test_hasten_text_of_many_chunks_is_done_in_as_many_batches() -> None:
    heap = Heap()
    heap.push(works([20] * 200))
    odd = work(250, 250, 31, 250, owner=777)
    heap.push([odd])
    heap.hasten(odd)
    for _ in range(4):
        heap.push(works([60] * 50))
        batch = heap.take(300)
        assert batch is not None
        assert 777 in owners(batch)
    assert heap.discard([odd]) == 0


def test_hasten_unknown_text_is_false() -> None:
    heap = Heap()
    heap.push(works([5]))
    assert not heap.hasten(work(5, client=heap.client))


def test_take_urgent_class_goes_first_and_is_filled_up_without_padding() -> None:
    heap = Heap()
    heap.push(works([10, 19, 20, 21, 40], priority=1))
    heap.push([work(20, owner=100 + number, priority=0) for number in range(2)])
    batch = heap.take(80)
    assert batch is not None
    assert sorted(item.length for item in batch.chunks) == [19, 20, 20, 20]  # not 21: that would pad the urgent one
    assert 100 in owners(batch)
    assert batch.longest == 20


def test_take_urgent_class_is_filled_up_with_no_more_rows_than_it_has() -> None:
    heap = Heap()
    heap.push(works([20] * 50, priority=1))
    heap.push([work(20, owner=100 + number, priority=0) for number in range(3)])
    batch = heap.take(1000)
    assert batch is not None
    assert sorted(item.work.priority for item in batch.chunks) == [0, 0, 0, 1, 1, 1]


# --- clients ---


def clients_of(batch: Batch | None, clients: list[Client]) -> Counter[int]:
    assert batch is not None
    return Counter(clients.index(item.work.client) for item in batch.chunks)


def test_take_clients_of_one_class_take_turns() -> None:
    heap, clients = Heap(), [Client() for _ in range(3)]
    heap.push(one for client in clients for one in works([20] * 20, client=client))
    assert [max(clients_of(heap.take(80), clients)) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_take_clients_of_one_class_fill_each_others_batches() -> None:
    heap, clients = Heap(), [Client() for _ in range(4)]
    heap.push(work(20, client=client) for client in clients)
    assert clients_of(heap.take(80), clients) == Counter(range(4))


def test_take_held_client_stays_also_where_it_would_fill_a_batch() -> None:
    heap, clients = Heap(), [Client(), Client()]
    heap.push(work(20, client=client) for client in clients)
    clients[1].is_held = True
    assert clients_of(heap.take(80), clients) == Counter({0: 1})
    assert heap.take(80) is None
    assert heap.most_urgent() is None
    clients[1].is_held = False
    assert heap.most_urgent() == 0
    assert clients_of(heap.take(80), clients) == Counter({1: 1})


def test_take_draining_client_leaves_the_choice_for_others() -> None:
    heap, clients = Heap(), [Client(), Client()]
    heap.push(one for client in clients for one in works([*[20] * 20, 59], client=client))
    clients[1].is_draining = True
    of_open, of_drained = heap.take(200), heap.take(200)
    assert of_open is not None
    assert of_drained is not None
    assert of_open.longest == 20
    assert of_drained.longest == 59  # from the longest down: it matters what is left


def test_discard_client_leaves_the_others() -> None:
    heap, clients = Heap(), [Client() for _ in range(3)]
    heap.push(one for client in clients for one in works([20] * 5, client=client))
    heap.discard_client(clients[1])
    assert (len(heap), heap.n_tokens) == (10, 200)
    assert [(client.n_chunks, client.n_tokens) for client in clients] == [(5, 100), (0, 0), (5, 100)]
    assert {at for batch in drain(heap, 1000) for at in clients_of(batch, clients)} == {0, 2}


def test_take_old_window_of_a_later_class_does_not_shut_out_the_urgent_one() -> None:
    """In a flood a whole window of bulk grows old together: it then gets one batch in four, and no row of blocks."""
    heap = Heap(max_age=8)
    heap.push(works([20] * 40, priority=1))
    served = []
    for _ in range(100):
        heap.push(works([37] * 4))
        batch = heap.take(80)
        assert batch is not None
        served.append(batch.longest == 20)
    assert served.count(True) == 10
    first = served.index(True)
    assert first <= 2 * 8
    assert served[first : first + 4 * 10 : FORCED_EVERY] == [True] * 10


def test_take_full_urgent_class_takes_no_other() -> None:
    heap = Heap()
    heap.push(works([20] * 4, priority=1))
    heap.push(works([20] * 4, priority=0))
    batch = heap.take(80)
    assert batch is not None
    assert {item.work.priority for item in batch.chunks} == {0}


@given(
    urgent=st.lists(_lengths, min_size=1, max_size=20),
    bulk=st.lists(_lengths, max_size=60),
    limit=_limits,
    max_rows=_rows,
)
def test_take_any_classes_filling_never_adds_padding(
    urgent: list[int], bulk: list[int], limit: int, max_rows: int | None
) -> None:
    heap = Heap()
    heap.push(works(bulk, priority=3))
    heap.push(works(urgent, priority=1))
    batch = heap.take(limit, max_rows)
    assert batch is not None
    check_size(batch, limit, max_rows)
    own = [item.length for item in batch.chunks if item.work.priority == 1]
    assert own
    assert batch.longest == max(own)


# --- padding and cost ---


def padding_of(lengths: list[int], limit: int, *, in_order: bool = False) -> float:
    """Padded tokens that carried nothing over those that did, through a window as deep as the engine's."""
    if in_order:
        return _padding_in_order(lengths, limit)
    heap, source, batches = Heap(), iter(works(lengths)), []
    ended = False
    while True:
        while not ended and heap.n_tokens < WINDOW_BATCHES * limit and len(heap) < WINDOW_CHUNKS:
            item = next(source, None)
            ended = item is None
            heap.push([item] if item is not None else [])
            if ended:
                heap.client.is_draining = True
        batch = heap.take(limit)
        if batch is None:
            break
        batches.append(batch)
    assert sum(len(batch.chunks) for batch in batches) == len(lengths)
    return _padding(batches)


def _padding(batches: list[Batch]) -> float:
    useful = sum(batch.row_tokens for batch in batches)
    return sum(batch.padded_tokens for batch in batches) / useful - 1


def _padding_in_order(lengths: list[int], limit: int) -> float:
    batches: list[Batch] = []
    rows: list[Chunk] = []
    for item in chunks(lengths):
        if rows and (len(rows) + 1) * max(row.length for row in [*rows, item]) > limit:
            batches.append(Batch(tuple(rows)))
            rows = []
        rows.append(item)
    return _padding([*batches, Batch(tuple(rows))])


@pytest.fixture(scope="module")
def mixed_lengths() -> list[int]:
    drawn = np.random.default_rng(7).lognormal(np.log(40), 1.0, 20_000)
    lengths: list[int] = np.clip(drawn, 3, 256).astype(int).tolist()
    return lengths


@pytest.mark.parametrize("limit", [512, 1024, 2048, 16_384])
def test_take_mixed_lengths_pads_little(mixed_lengths: list[int], limit: int) -> None:
    assert padding_of(mixed_lengths, limit) <= 0.06
    assert padding_of(mixed_lengths, limit, in_order=True) > 0.5  # the control: the bound above means something


def lines_run(call: Any) -> int:
    """Lines of Python that `call()` runs, loops counted as often as they go round."""
    n_lines = 0

    def trace(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal n_lines
        n_lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return n_lines


@pytest.mark.parametrize("urgent", [False, True])
def test_take_window_of_20_000_chunks_does_not_loop_over_it(mixed_lengths: list[int], urgent: bool) -> None:
    heap = Heap()
    pushed = works(mixed_lengths, priority=1)
    heap.push(pushed)
    if urgent:
        heap.push([work(50, owner=-1)])
    assert len(heap) >= WINDOW_CHUNKS
    heap.take(512)
    heap.push(works([40] * 64, priority=1))
    assert lines_run(lambda: heap.take(512, max_rows=64)) < 2000
    assert lines_run(lambda: heap.hasten(pushed[5])) < 500


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    gone=st.lists(st.integers(0, 45)),
    urgent=st.sets(st.integers(0, 39)),
)
def test_discard_many_drops_just_those_of_all_classes(lengths: list[int], gone: list[int], urgent: set[int]) -> None:
    heap = Heap()
    pushed = [work(length, owner=owner, priority=owner not in urgent) for owner, length in enumerate(lengths)]
    heap.push(pushed)
    assert heap.discard([pushed[at] for at in gone if at < len(pushed)]) == len(set(gone) & set(range(len(lengths))))
    left: list[int] = []
    while batch := heap.take(100):
        left += [owner_of(item) for item in batch.chunks]
    assert sorted(left) == sorted(set(range(len(lengths))) - set(gone))
    assert heap.n_tokens == 0


@pytest.mark.parametrize(("interactive_below", "comes_first"), [(10, True), (0, False)])
def test_take_somebody_who_waits_is_served_in_turn(interactive_below: int, comes_first: bool) -> None:
    heap = Heap(interactive_below=interactive_below)
    heap.push([work(3, owner=777)])  # shorter than all others: the best run anywhere is never one with it
    heap.push(works([40] * 40))
    batch = heap.take(120)
    assert batch is not None
    assert (777 in owners(batch)) is comes_first


def serve(lengths: list[int], n_callers: int, limit: int, *, interactive_below: int) -> tuple[float, npt.NDArray[Any]]:
    """Callers who each wait for one text and then ask for the next, on a device that takes a unit of time for each
    padded token and 20 for a batch: tokens per unit, and how long each caller waited."""
    heap, texts = Heap(interactive_below=interactive_below), iter(lengths)
    asked, now, n_useful = dict[int, float](), 0.0, 0
    waited = list[float]()

    def ask(n: int) -> None:
        for length in islice(texts, n):
            asked[len(asked)] = now
            heap.push([work(length, owner=len(asked) - 1)])

    ask(n_callers)
    while (batch := heap.take(limit)) is not None:
        now += batch.padded_tokens + 20
        n_useful += batch.row_tokens
        waited += [now - asked[owner_of(item)] for item in batch.chunks]
        ask(len(batch.chunks))
    return n_useful / now, np.array(waited)


@pytest.mark.parametrize(
    ("median", "spread", "n_callers", "most"),
    [(60, 0.9, 8, 2.0), (60, 0.9, 64, 1.4), (60, 0.9, 512, 1.2), (15, 0.3, 64, 1.7), (15, 0.3, 512, 1.4)],
)
def test_take_callers_who_wait_wait_nearly_alike_and_the_model_does_as_much(
    median: int, spread: float, n_callers: int, most: float
) -> None:
    dice = np.random.default_rng(3)
    lengths = np.clip(median * np.exp(dice.normal(0, spread, 6000)), 4, 256).astype(int).tolist()
    rate, waited = serve(lengths, n_callers, 512, interactive_below=10)
    steady = waited[n_callers:-n_callers]
    assert np.percentile(steady, 99) <= most * steady.mean()
    best_rate, _ = serve(lengths, n_callers, 512, interactive_below=0)
    assert rate >= 0.86 * best_rate


def test_take_beside_those_who_wait_batches_are_half_as_large_for_a_while() -> None:
    heap = Heap(interactive_below=10)
    heap.push(works([10] * 4000, priority=10))

    def next_size() -> int:
        batch = heap.take(100)
        assert batch is not None
        return batch.padded_tokens

    assert next_size() == 100
    heap.push([work(10, priority=0)])
    assert next_size() < 100  # somebody who waits
    assert [next_size() for _ in range(BESIDE)] == [50] * BESIDE
    assert next_size() == 100


def test_take_without_padding_gives_the_oldest_rows_whatever_their_lengths() -> None:
    heap = Heap()
    heap.push([work(length, owner=owner) for owner, length in enumerate([5, 200, 7, 90, 3, 60])])
    first, second = heap.take(280, pads=False), heap.take(1000, max_rows=2, pads=False)
    assert first is not None
    assert second is not None
    assert owners(first) == {0, 1, 2}  # the fourth would be too much
    assert (first.padded_tokens, first.halves()[1].padded_tokens) == (212, 207)
    assert owners(second) == {3, 4}
