"""The consumer on a real loop and a real thread: every chunk comes out once, whatever the model does."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.encoders.base import Encoder, FloatMatrix
from asyncembed.encoders.failures import FailureKind
from asyncembed.engine.engine import EncoderThread, Engine, ModelRunner
from asyncembed.engine.limits import TokenLimitEstimator
from asyncembed.engine.scheduler import BROKEN_AFTER, BULK, LimitEstimator
from asyncembed.engine.work import Client, Work
from asyncembed.errors import ModelError
from asyncembed.records import Batch
from asyncembed.threads import WorkerThread

from .fakes import FakeEncoder, chunks, owner_of, owners, vector_of, work, works


class Bench(Client):
    """A client of a engine with one encoder, and what came out of it."""

    def __init__(
        self, encoder: FakeEncoder, estimator: LimitEstimator | None = None, max_rows: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.estimator = estimator if estimator is not None else TokenLimitEstimator(100)
        self.worker = WorkerThread("core-model")
        self.thread = EncoderThread(encoder, self.estimator, thread=self.worker, max_rows=max_rows)
        self.engine = Engine(self.thread)
        self.embedded: list[int] = []
        self.failed: dict[int, str] = {}
        self._changed = asyncio.Event()

    def settled(self, done: Iterable[Work]) -> None:
        for item in done:
            number = int(str(item.text))
            if item.error is None:
                assert item.embedding is not None
                assert item.embedding.tolist() == vector_of(item.chunks[0]).tolist()
                self.embedded.append(number)
            else:
                assert number not in self.failed
                self.failed[number] = item.error
        self._changed.set()

    async def until(self, check: Callable[[], bool]) -> None:
        """Waits for what came out to be as wanted."""
        while not check():
            self._changed.clear()
            await self._changed.wait()

    def push(self, items: Iterable[Work]) -> None:
        """Lets texts of nobody who is in a hurry wait."""
        pushed = list(items)
        for item in pushed:
            item.client, item.priority = self, item.priority + BULK
        self.engine.push(pushed)

    async def run(self, items: Iterable[Work]) -> None:
        """Puts texts in and embeds them all."""
        self.push(items)
        self.engine.close()
        try:
            await self.engine.run()
        finally:
            await self.worker.aclose()

    def check_all_once(self, items: list[Work], failed: Iterable[int] = ()) -> None:
        """Every text was embedded exactly once, but for those that failed."""
        assert set(self.failed) == set(failed)
        wanted = [int(str(item.text)) for item in items]
        assert Counter(self.embedded) == Counter(number for number in wanted if number not in self.failed)
        assert (self.n_chunks, self.n_tokens, self.thread.n_in_hand) == (0, 0, 0)
        assert len(self.encoder.threads) == 1


class Step:
    """Holds the model in the `start` of every batch until the test lets it go."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Queue[Batch] = asyncio.Queue()
        self._go = threading.Semaphore(0)

    def __call__(self, batch: Batch) -> None:
        self._loop.call_soon_threadsafe(self._begun.put_nowait, batch)
        assert self._go.acquire(timeout=60)

    async def begun(self) -> Batch:
        return await self._begun.get()

    def let_go(self, times: int = 1) -> None:
        self._go.release(times)


def fails_on(*bad: int) -> Callable[[Batch], Exception | None]:
    """A model that fails on any batch holding one of these texts."""
    return lambda batch: ValueError("bad row") if owners(batch) & set(bad) else None


# --- all goes well ---


@pytest.mark.parametrize("slots", [1, 2, 3])
async def test_run_every_chunk_is_embedded_once_with_its_own_vector(slots: int) -> None:
    bench, items = Bench(FakeEncoder(slots=slots)), works([3, 50, 7, 7, 99, 20] * 20)
    await bench.run(items)
    bench.check_all_once(items)
    assert bench.encoder.most_under_way == slots
    assert list(map(id, bench.encoder.finished)) == list(map(id, bench.encoder.started))  # in the order of starting
    done = bench.engine.statistics
    assert (done.batches, done.ooms) == (len(bench.encoder.started), 0)
    assert done.row_tokens == sum(item.chunks[0].length for item in items)
    assert done.padded_tokens == sum(batch.padded_tokens for batch in bench.encoder.finished)


@pytest.mark.parametrize("slots", [1, 2])
async def test_run_nothing_to_do_ends(slots: int) -> None:
    bench = Bench(FakeEncoder(slots=slots))
    await bench.run([])
    assert bench.encoder.started == []


async def test_run_max_rows_is_kept() -> None:
    bench, items = Bench(FakeEncoder(), max_rows=3), works([2] * 20)
    await bench.run(items)
    bench.check_all_once(items)
    assert max(len(batch.chunks) for batch in bench.encoder.started) == 3


@pytest.mark.parametrize("slots", [1, 2])
async def test_run_chunks_that_come_late_wake_it(slots: int) -> None:
    bench, items = Bench(FakeEncoder(slots=slots)), works([10] * 6)
    running = asyncio.ensure_future(bench.engine.run())
    for item in items:
        bench.push([item])
        # Even with a slot left, what has begun is finished when nothing more comes.
        await bench.until(lambda wanted=int(str(item.text)): wanted in bench.embedded)
    assert not running.done()
    bench.engine.close()
    await running
    await bench.worker.aclose()
    bench.check_all_once(items)


# --- failures ---


@pytest.mark.parametrize("fail_in_start", [False, True])
@pytest.mark.parametrize("slots", [1, 2])
async def test_run_out_of_memory_above_a_size_all_come_out_once_and_the_limit_falls(
    slots: int, fail_in_start: bool
) -> None:
    encoder = FakeEncoder(slots=slots, capacity=150, fail_in_start=fail_in_start)
    bench, items = Bench(encoder, TokenLimitEstimator(1000)), works([10, 20, 30, 40] * 50)
    await bench.run(items)
    bench.check_all_once(items)
    assert bench.estimator() <= 150
    ooms = bench.engine.statistics.ooms
    assert 1 <= ooms <= 12
    assert encoder.times_freed == ooms  # once for each failure, never for a batch that passed


@pytest.mark.parametrize("slots", [1, 2])
async def test_run_single_chunk_too_large_fails_alone(slots: int) -> None:
    bench = Bench(FakeEncoder(slots=slots, capacity=100), TokenLimitEstimator(1000))
    items = works([10] * 30 + [300] + [20] * 30)
    await bench.run(items)
    bench.check_all_once(items, failed=[30])
    assert bench.failed[30] == "a chunk of 300 tokens does not fit into memory even alone"


async def test_run_every_chunk_too_large_fails_each_and_never_the_run() -> None:
    bench, items = Bench(FakeEncoder(capacity=5), TokenLimitEstimator(100)), works([10] * (3 * BROKEN_AFTER))
    await bench.run(items)
    bench.check_all_once(items, failed=range(len(items)))


class Stubborn:
    """An estimator that learns nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self) -> int:
        return self.limit

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None: ...

    def fail(self, n_tokens: int) -> None: ...


@pytest.mark.parametrize("limit", [1000, 0, -3])
async def test_run_estimator_that_never_changes_its_limit_still_ends(limit: int) -> None:
    bench, items = Bench(FakeEncoder(capacity=50), Stubborn(limit)), works([10, 20, 30] * 30)
    await bench.run(items)
    bench.check_all_once(items)


@pytest.mark.parametrize("fail_in_start", [False, True])
@pytest.mark.parametrize("slots", [1, 2])
async def test_run_poison_is_isolated_and_its_neighbours_are_unharmed(slots: int, fail_in_start: bool) -> None:
    encoder = FakeEncoder(slots=slots, error_of=fails_on(17, 60), fail_in_start=fail_in_start)
    bench, items = Bench(encoder, TokenLimitEstimator(640)), works([10] * 100)
    await bench.run(items)
    bench.check_all_once(items, failed=[17, 60])
    assert bench.failed[17] == "the model failed on it: ValueError: bad row"
    assert bench.estimator() == 640  # a bad row says nothing about memory
    assert encoder.times_freed == 0


@pytest.mark.parametrize("slots", [1, 2])
async def test_run_poison_while_more_keeps_arriving_is_isolated_by_halving(slots: int) -> None:
    """The halves are not mixed with what arrives: that would begin the search anew each time."""
    loop, rows, rounds = asyncio.get_running_loop(), 64, 200
    n_pushed, seen, failing = rows, threading.Event(), 0
    items = works([10] * rows)
    poison = rows - 1

    def arrive() -> None:
        nonlocal n_pushed
        if n_pushed < rows * rounds:
            fresh = [work(10, owner=n_pushed + number) for number in range(4)]
            n_pushed += 4
            items.extend(fresh)
            bench.push(fresh)
        seen.set()

    def on_start(batch: Batch) -> None:  # something arrives while any batch is under way
        nonlocal failing
        failing += poison in owners(batch)
        seen.clear()
        loop.call_soon_threadsafe(arrive)
        assert seen.wait(60)
        if failing and poison in bench.failed:
            nonlocal n_pushed
            n_pushed = rows * rounds

    bench = Bench(
        FakeEncoder(slots=slots, error_of=fails_on(poison), on_start=on_start), TokenLimitEstimator(10 * rows)
    )
    bench.push(items)
    running = asyncio.ensure_future(bench.engine.run())
    await bench.until(lambda: poison in bench.failed)
    bench.engine.close()
    await running
    await bench.worker.aclose()
    bench.check_all_once(items, failed=[poison])
    assert failing <= math.log2(rows) + 1


@pytest.mark.parametrize("fail_in_start", [False, True])
@pytest.mark.parametrize("slots", [1, 2])
async def test_run_dead_device_stops_the_run(slots: int, fail_in_start: bool) -> None:
    dead = RuntimeError("CUDA error: an illegal memory access was encountered")
    encoder = FakeEncoder(
        slots=slots, error_of=lambda batch: dead if 5 in owners(batch) else None, fail_in_start=fail_in_start
    )
    bench = Bench(encoder, TokenLimitEstimator(20))
    with pytest.raises(ModelError, match="illegal memory access") as raised:
        await bench.run(works([10] * 40))
    assert raised.value.__cause__ is dead
    assert bench.failed == {}
    assert 5 not in bench.embedded


async def test_run_broken_model_stops_after_a_number_of_chunks() -> None:
    bench = Bench(FakeEncoder(error_of=lambda _: ValueError("no such layer")), TokenLimitEstimator(1000))
    with pytest.raises(ModelError, match=rf"failed on {BROKEN_AFTER} chunks in a row.*ValueError: no such layer"):
        await bench.run(works([10] * 200))
    assert len(bench.failed) == BROKEN_AFTER - 1  # the last is not blamed for it


async def test_run_many_bad_rows_with_good_ones_between_do_not_stop_it() -> None:
    bad = [number for number in range(400) if number % 4]
    bench, items = Bench(FakeEncoder(error_of=fails_on(*bad)), TokenLimitEstimator(1000)), works([10] * 400)
    await bench.run(items)
    bench.check_all_once(items, failed=bad)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    slots=st.integers(1, 3),
    capacity=st.integers(1, 200),
    limit=st.integers(1, 300),
    bad=st.sets(st.integers(0, 59), max_size=BROKEN_AFTER - 1),
    fail_in_start=st.booleans(),
)
def test_run_any_mix_of_failures_every_chunk_has_one_end(
    lengths: list[int], slots: int, capacity: int, limit: int, bad: set[int], fail_in_start: bool
) -> None:
    async def go() -> None:
        encoder = FakeEncoder(slots=slots, capacity=capacity, error_of=fails_on(*bad), fail_in_start=fail_in_start)
        bench, items = Bench(encoder, TokenLimitEstimator(limit)), works(lengths)
        await bench.run(items)
        too_large = {owner for owner, length in enumerate(lengths) if length > capacity}
        bench.check_all_once(items, failed=too_large | {owner for owner in bad if owner < len(lengths)})
        assert bench.engine.statistics.row_tokens == sum(lengths[owner] for owner in bench.embedded)

    asyncio.run(go())


# --- memory of a failed batch ---


class Tensor:
    """Stands for something large on the device."""


def test_advance_out_of_memory_lets_go_of_the_batch_before_memory_is_freed() -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Leaky(FakeEncoder):
        def start(self, batch: Batch) -> object:
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            try:
                return self.layer()
            except KeyError as inner:
                raise RuntimeError("CUDA out of memory. Tried to allocate") from inner

        def layer(self) -> object:
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            raise KeyError("the cause holds its frames as well")

        def free_memory(self) -> None:
            alive.extend(reference() is not None for reference in held)

    gc.disable()
    try:
        outcome = ModelRunner(Leaky()).advance(Batch(tuple(chunks([3, 3]))))
    finally:
        gc.enable()
    assert outcome is not None
    assert outcome.kind is FailureKind.OUT_OF_MEMORY
    assert alive == [False, False]


def test_advance_two_slots_keeps_two_under_way_and_finishes_the_oldest() -> None:
    encoder = FakeEncoder(slots=2)
    runner, batches = ModelRunner(encoder), [Batch((item,)) for item in chunks([3, 4, 5])]
    assert runner.advance(batches[0]) is None
    for later, earlier in ((1, 0), (2, 1)):
        outcome = runner.advance(batches[later])
        assert outcome is not None
        assert outcome.batch is batches[earlier]
        assert outcome.seconds >= 0
    outcome = runner.advance(None)
    assert outcome is not None
    assert outcome.batch is batches[2]
    assert runner.advance(None) is None
    assert encoder.most_under_way == 2


def test_advance_urgent_batch_is_finished_first_but_the_oldest_is_not_passed_by_for_ever() -> None:
    runner = ModelRunner(FakeEncoder(slots=2))
    bulk = Batch(work(50, owner=0, priority=10).chunks)
    urgent = [Batch(work(3, owner=1 + number, priority=0).chunks) for number in range(6)]
    assert runner.advance(bulk) is None
    finished = []
    for batch in urgent:
        outcome = runner.advance(batch)
        assert outcome is not None
        finished.append(outcome.batch)
    assert finished[:2] == urgent[:2]
    assert finished[2] is bulk


def test_fake_encoder_is_an_encoder() -> None:
    assert isinstance(FakeEncoder(), Encoder)


# --- cancellation, stopping, and the batch kept ready ---


@pytest.mark.parametrize("slots", [1, 2])
async def test_run_cancelled_calls_of_the_model_stay_in_one_thread_and_never_overlap(slots: int) -> None:
    step = Step()
    encoder = FakeEncoder(slots=slots, on_start=step)
    first = Bench(encoder, TokenLimitEstimator(10))
    first.push(works([10] * 20))
    running = asyncio.ensure_future(first.engine.run())
    await step.begun()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    second, items = Bench(encoder, TokenLimitEstimator(10)), works([10] * 5)  # the next user of the same thread
    spare, second.worker = second.worker, first.worker
    await spare.aclose()
    second.thread = EncoderThread(encoder, second.estimator, thread=first.worker)
    second.engine = Engine(second.thread)
    second.push(items)
    second.engine.close()
    step.let_go(1000)
    await second.engine.run()  # an overlap would have failed in the model, as a failed chunk
    await first.worker.aclose()
    second.check_all_once(items)


async def test_run_cancelled_batch_in_hand_runs_to_its_end_and_what_waits_is_dropped() -> None:
    step = Step()
    bench = Bench(FakeEncoder(on_start=step), TokenLimitEstimator(10))
    bench.push(works([10] * 20))
    running = asyncio.ensure_future(bench.engine.run())
    await step.begun()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    closing = asyncio.ensure_future(bench.worker.aclose())
    await asyncio.sleep(0)
    step.let_go(1000)
    await closing
    assert len(bench.encoder.finished) == len(bench.encoder.started) == 1
    assert bench.embedded == []


@pytest.mark.parametrize("slots", [1, 2])
async def test_stop_only_what_has_begun_is_finished(slots: int) -> None:
    step = Step()
    bench = Bench(FakeEncoder(slots=slots, on_start=step), TokenLimitEstimator(10))
    bench.push(works([10] * 20))
    running = asyncio.ensure_future(bench.engine.run())
    first = await step.begun()
    bench.engine.stop(bench)
    bench.engine.close()
    step.let_go(1000)
    await running
    await bench.worker.aclose()
    assert bench.embedded == [owner_of(item) for item in first.chunks]
    assert bench.encoder.started == [first]


async def test_run_wrong_number_of_rows_is_not_taken() -> None:
    class Short(FakeEncoder):
        def finish(self, handle: object) -> FloatMatrix:
            return super().finish(handle)[:1]

    bench = Bench(Short())
    with pytest.raises(ModelError, match=r"shape \(1, \d+\) for 5 rows"):
        await bench.run(works([10] * 5))


async def test_run_device_that_fails_to_free_memory_still_backs_off() -> None:
    class Clumsy(FakeEncoder):
        def free_memory(self) -> None:
            super().free_memory()
            raise RuntimeError("nothing to free")

    def too_large(batch: Batch) -> Exception | None:
        return RuntimeError("CUDA out of memory. Tried to allocate 2 GiB") if batch.padded_tokens > 40 else None

    bench, items = Bench(Clumsy(error_of=too_large), TokenLimitEstimator(1000)), works([10] * 30)
    await bench.run(items)
    bench.check_all_once(items, failed=[])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=20, max_size=200),
    capacities=st.lists(st.integers(60, 600), min_size=1, max_size=6),
    every=st.integers(1, 20),
    slots=st.integers(1, 3),
    limit=st.integers(1, 2000),
)
def test_run_memory_that_shrinks_and_grows_fails_no_text_and_ends_below_it(
    lengths: list[int], capacities: list[int], every: int, slots: int, limit: int
) -> None:
    async def go() -> None:
        number = 0

        def error_of(batch: Batch) -> Exception | None:
            nonlocal number
            number += 1
            capacity = capacities[min(number // every, len(capacities) - 1)]
            return MemoryError() if batch.padded_tokens > capacity else None

        bench, items = Bench(FakeEncoder(slots=slots, error_of=error_of), TokenLimitEstimator(limit)), works(lengths)
        await bench.run(items)
        bench.check_all_once(items)
        # Each size of memory costs a halving down to it and a bisection, in every slot and in what stands ready.
        halvings = math.log2(max(2, limit)) + 8
        assert bench.engine.statistics.ooms <= len(capacities) * halvings * (slots + 2)

    asyncio.run(go())


async def test_run_chunk_that_does_not_fit_at_first_is_tried_again_when_memory_is_back() -> None:
    tries = 0

    def error_of(_: Batch) -> Exception | None:
        nonlocal tries
        tries += 1
        return MemoryError() if tries == 1 else None

    bench, items = Bench(FakeEncoder(error_of=error_of)), works([5])
    await bench.run(items)
    bench.check_all_once(items)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120),
    slots=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    capacities=st.tuples(st.integers(60, 300), st.integers(60, 300), st.integers(60, 300)),
    bad=st.sets(st.integers(0, 119), max_size=BROKEN_AFTER - 1),
)
def test_run_several_encoders_share_the_work_and_what_is_tried_again(
    lengths: list[int], slots: list[int], capacities: tuple[int, int, int], bad: set[int]
) -> None:
    async def go() -> None:
        encoders = [
            FakeEncoder(slots=n, capacity=capacity, error_of=fails_on(*bad))
            for n, capacity in zip(slots, capacities, strict=False)
        ]
        bench, items = Bench(encoders[0]), works(lengths)
        threads = [WorkerThread(f"core-model-{number}") for number in range(len(encoders))]
        encoder_threads = [
            EncoderThread(encoder, TokenLimitEstimator(200), thread=thread)
            for encoder, thread in zip(encoders, threads, strict=True)
        ]
        bench.engine = Engine(*encoder_threads)
        await bench.run(items)
        for thread in threads:
            await thread.aclose()
        assert set(bench.failed) == {owner for owner in bad if owner < len(lengths)}
        assert Counter(bench.embedded) == Counter(set(range(len(lengths))) - bad)

    asyncio.run(go())
