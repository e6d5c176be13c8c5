"""Requests on a model held in the test's hand: what runs with what, what is dropped, and what every caller gets."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import numpy as np
import pytest

from asyncembed import (
    AsyncEmbedder,
    ClosedError,
    DeadlineError,
    ModelError,
    OptionsError,
    OverloadedError,
    TextError,
    TextTypeError,
    embed_stream,
)
from asyncembed.engine.heap import ChunkHeap
from asyncembed.records import Batch
from tests.fakes import FakeEncoder

from .doubles import at_rest, busy, held_model, until, until_waiting, vector

pytestmark = pytest.mark.usefixtures("no_leftovers")


def start(work: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)


# --- what comes out ---


async def test_embed_text_list_and_nothing_have_their_shapes_and_order() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        one = await embedder.embed("a heron")
        many = await embedder.embed(["on the river", "a heron", "on the river"])
        none = await embedder.embed([])
    assert (one.shape, one.dtype, one.tolist()) == ((4,), np.float32, vector("a heron"))
    assert many.tolist() == [vector("on the river"), vector("a heron"), vector("on the river")]
    assert (none.shape, none.dtype) == ((0, 4), np.float32)


async def test_embed_long_text_is_the_average_of_its_chunks() -> None:
    async with AsyncEmbedder(FakeEncoder(max_tokens=6), chunk_size=2) as embedder:
        found = await embedder.embed("aa bb ccc")
    first, second = np.array(vector("aa bb")), np.array(vector("ccc"))
    assert found.tolist() == pytest.approx(((2 * first + second) / 3).tolist())


async def test_embed_result_is_the_callers_own() -> None:
    async with AsyncEmbedder(FakeEncoder(), cache_bytes="1MB") as embedder:
        for _ in range(2):
            found = await embedder.embed("a heron")
            found[:] = 0
        assert (await embedder.embed("a heron")).tolist() == vector("a heron")


async def test_embed_prompt_of_a_call_stands_before_its_texts_only() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        plain, prompted = await asyncio.gather(embedder.embed("heron"), embedder.embed("heron", prompt="find: "))
    assert plain.tolist() == vector("heron")
    assert prompted.tolist() == vector("find: heron")


async def test_embed_query_and_document_take_the_models_prompts() -> None:
    encoder = FakeEncoder()
    encoder.prompts = {"query": "q: ", "passage": "the passage: "}  # type: ignore[attr-defined]  # a model may have some
    async with AsyncEmbedder(encoder) as embedder:
        assert (await embedder.embed_query("heron")).tolist() == vector("q: heron")
        assert (await embedder.embed_document(["heron"])).tolist() == [vector("the passage: heron")]
        assert (await embedder.embed("heron", prompt_name="query")).tolist() == vector("q: heron")
        assert (await embedder.embed_query("heron", prompt="")).tolist() == vector("heron")
        with pytest.raises(OptionsError, match="no prompt named 'title'"):
            await embedder.embed("heron", prompt_name="title")


async def test_embed_records_tell_tokens_and_reasons() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        good, bad = await embedder.embed_records(["a heron", " "])
    assert (good.index, good.n_tokens, good.error) == (0, 2, None)
    assert good.embedding is not None
    assert (bad.index, bad.embedding, bad.error) == (1, None, "the text has no tokens")


async def test_embed_records_item_that_is_no_text_is_a_record_of_its_own() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        found = await embedder.embed_records([None, "a heron", b"a", "boat"])  # type: ignore[list-item]  # on purpose
        assert (await embedder.embed_records([3]))[0].error == "item 0 is an int, not a str"  # type: ignore[list-item]
        with pytest.raises(TypeError, match="not a dict"):
            await embedder.embed_records({"a": 1})  # type: ignore[arg-type]  # on purpose
    assert [(one.index, one.text, one.error) for one in found] == [
        (0, "", "item 0 is None, not a str"),
        (1, "a heron", None),
        (2, "", "item 2 is bytes, not a str; decode it first"),
        (3, "boat", None),
    ]
    assert found[3].embedding is not None
    assert found[3].embedding.tolist() == vector("boat")


async def test_embed_text_that_fails_is_named_and_the_rest_is_dropped() -> None:
    async with busy(batch_size=1) as (embedder, gate):
        with pytest.raises(TextError, match=r"text 1 \(''\) cannot be embedded: the text has no tokens") as raised:
            await embedder.embed(["one", "", "two"])
        assert raised.value.index == 1
    assert gate.batches == [["ahead"]]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"texts": 3}, "a text or a list of texts is needed, not an int"),
        ({"texts": b"a"}, "not bytes; decode it first"),
        ({"texts": {"a": 1}}, "not a dict; pass its texts in a list"),
        ({"texts": {"a", "b"}}, "not a set; pass its texts in a list"),
        ({"texts": ["a", None]}, "item 1 is None, not a str"),
        ({"texts": [b"a"]}, "item 0 is bytes, not a str; decode it first"),
        ({"texts": "a", "priority": "soon"}, "priority='soon' is not"),
        ({"texts": "a", "priority": -1}, "priority=-1 is not"),
        ({"texts": "a", "priority": True}, "priority=True is not"),
    ],
)
async def test_embed_argument_that_cannot_be_is_refused(call: dict[str, Any], reason: str) -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        with pytest.raises(TextTypeError if call["texts"] != "a" else OptionsError, match=reason) as raised:
            await embedder.embed(**call)
    assert isinstance(raised.value, TypeError) != isinstance(raised.value, ValueError)


@pytest.mark.parametrize("of", [list, tuple, iter, lambda texts: dict.fromkeys(texts).keys(), np.array])
async def test_embed_anything_that_has_an_order_is_a_list_of_texts(of: Any) -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        assert (await embedder.embed(of(["a heron", "boat"]))).tolist() == [vector("a heron"), vector("boat")]


async def test_embedder_that_would_keep_more_dimensions_than_there_are_is_not_opened() -> None:
    with pytest.raises(OptionsError, match="truncate_dim=5 is more than the 4 dimensions"):
        async with AsyncEmbedder(FakeEncoder(dim=4), truncate_dim=5):
            pass
    async with AsyncEmbedder(FakeEncoder(dim=4), truncate_dim=4) as embedder:
        assert embedder.dim == 4


@pytest.mark.parametrize("options", [{"save_path": "data"}, {"ordered": True}, {"nonsense": 1}, {"dtype": "float8"}])
def test_embedder_option_without_meaning_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match=next(iter(options))):
        AsyncEmbedder(FakeEncoder(), **options)


# --- sharing batches ---


async def test_embed_requests_that_come_while_the_model_works_share_the_next_batch() -> None:
    async with busy() as (embedder, gate):
        rest = [start(embedder.embed(f"text {number}")) for number in range(20)]
        await until_waiting(embedder, 20)
        gate.let_go(2)
        found = await asyncio.gather(*rest)
    assert [sorted(texts) for texts in gate.batches[1:]] == [sorted(f"text {number}" for number in range(20))]
    assert [row.tolist() for row in found] == [vector(f"text {number}") for number in range(20)]


async def test_embed_several_idle_slots_share_what_waits() -> None:
    gate, encoder = held_model(slots=2)
    async with AsyncEmbedder(encoder) as embedder:
        asked = start(embedder.embed([f"text {number}" for number in range(8)]))
        await gate.begun()
        gate.let_go(10)
        await asked
    assert [len(texts) for texts in gate.batches] == [4, 4]


async def test_embed_same_text_in_flight_is_computed_once() -> None:
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder) as embedder:
        twins = [start(embedder.embed(texts)) for texts in ("heron", "heron", ["heron", "boat", "heron"])]
        gate.let_go(10)
        found = await asyncio.gather(*twins)
        assert at_rest(embedder)
    assert sorted(text for texts in gate.batches for text in texts) == ["boat", "heron"]
    assert found[0].tolist() == found[1].tolist() == found[2][2].tolist() == vector("heron")


async def test_embed_nowait_answered_is_gone_when_its_future_is_done() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        at_the_end: list[bool] = []
        future = embedder.embed_nowait(["heron", "boat", "heron", ""])
        future.add_done_callback(lambda _: at_the_end.append(at_rest(embedder)))
        with pytest.raises(TextError):
            await future
        assert (await embedder.embed_nowait([])).shape == (0, 4)
        await until(lambda: at_rest(embedder))
    assert at_the_end == [True]


async def test_embed_same_text_asked_for_more_urgently_goes_sooner() -> None:
    async with busy(batch_size=1) as (embedder, gate):
        start(embedder.embed([f"bulk {number}" for number in range(5)], priority="bulk"))
        await until_waiting(embedder, 5)
        start(embedder.embed("bulk 3"))
        await until(lambda: embedder.statistics().requests == 3)
    assert gate.batches[1] == ["bulk 3"]
    assert len(gate.batches) == 6


async def test_embed_cached_text_is_not_computed_again_until_it_is_pushed_out() -> None:
    encoder = FakeEncoder()
    async with AsyncEmbedder(encoder, cache_bytes=2 * (400 + 5 + 16)) as embedder:
        for text in ("heron", "boats", "heron", "reeds", "boats", "reeds"):
            await embedder.embed(text)
        assert embedder.statistics().cache_hits == 2  # heron, then reeds: boats was the least recently used
        assert 0 < embedder.statistics().cache_bytes <= 2 * 421
    assert encoder.rows == 4


# --- priorities ---


async def test_embed_interactive_request_is_in_the_next_batch() -> None:
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder, batch_size=4) as embedder:
        bulk = start(embedder.embed([f"bulk {number}" for number in range(12)], priority="bulk"))
        await gate.begun()
        await until_waiting(embedder, 8)
        urgent = start(embedder.embed("somebody waits"))
        await until(lambda: embedder.statistics().requests == 2 and embedder.statistics().waiting_chunks == 9)
        gate.let_go(10)
        await asyncio.gather(bulk, urgent)
    assert "somebody waits" in gate.batches[1]


async def test_embed_numbers_order_requests() -> None:
    async with busy(batch_size=1) as (embedder, gate):
        for number in (30, 5, 100, 0):
            embedder.embed_nowait(f"p{number}", priority=number)
        await until_waiting(embedder, 4)
    assert gate.batches[1:] == [["p0"], ["p5"], ["p30"], ["p100"]]


async def test_embed_bulk_under_an_interactive_flood_advances() -> None:
    """Four texts always wait, so the flood alone would fill every batch for ever."""
    encoder = FakeEncoder()
    async with AsyncEmbedder(encoder, batch_size=2) as embedder:
        bulk = start(embedder.embed([f"bulk {number}" for number in range(6)], priority="bulk"))
        number = 0

        async def client() -> None:
            nonlocal number
            while not bulk.done():
                number += 1
                await embedder.embed(f"asked {number}")

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for _ in range(6):
                    group.start_soon(client)
        assert (await bulk).shape == (6, 4)


# --- overload ---


async def test_embed_without_room_waits_and_nowait_says_so() -> None:
    async with busy(max_pending_bytes=4000, batch_size=1) as (embedder, gate):
        with pytest.raises(OverloadedError, match=r"1 with \d+ of 2000 bytes are under way.*max_pending_bytes"):
            embedder.embed_nowait("two")
        waits = start(embedder.embed("three"))
        await until(lambda: embedder.statistics().waiting_texts == 1)
        later = embedder.embed_nowait("the other half", priority="bulk")  # kept apart
        gate.let_go(10)
        assert (await waits).tolist() == vector("three")
        assert (await later).tolist() == vector("the other half")


async def test_embed_list_larger_than_the_room_goes_in_by_pieces() -> None:
    encoder = FakeEncoder()
    texts = [f"text {number}" for number in range(50)]
    async with AsyncEmbedder(encoder, max_pending_bytes=8000) as embedder:
        found = await embedder.embed(texts)
        assert at_rest(embedder)
        with pytest.raises(OverloadedError):
            embedder.embed_nowait(texts)
        assert at_rest(embedder)
    assert found.tolist() == [vector(text) for text in texts]
    assert len(encoder.batches) == 0 or max(encoder.batches) <= 4


async def test_embed_cancelled_while_it_waits_for_room_leaves_nothing() -> None:
    async with busy(max_pending_bytes=4000) as (embedder, gate):
        waits = start(embedder.embed(["two", "three"]))
        await until(lambda: embedder.statistics().waiting_texts == 1)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
    assert gate.batches == [["ahead"]]


# --- cancelled and too late ---


@pytest.mark.parametrize("how", ["task", "deadline", "future"])
async def test_embed_given_up_costs_nothing(how: str) -> None:
    async with busy() as (embedder, gate):
        stays = embedder.embed_nowait("stays")
        if how == "deadline":
            with pytest.raises(DeadlineError, match=r"2 texts not embedded within deadline_s=0.01") as raised:
                await embedder.embed(["gone", "gone too"], deadline_s=0.01)
            assert isinstance(raised.value, TimeoutError)
        else:
            asked: Any = embedder.embed_nowait("gone") if how == "future" else start(embedder.embed("gone"))
            await until(lambda: embedder.statistics().requests == 3 and embedder.statistics().waiting_chunks == 2)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        await until(lambda: embedder.statistics().pending_requests == 2)
        gate.let_go(10)
        await stays
    assert gate.batches == [["ahead"], ["stays"]]


async def test_embed_given_up_while_its_batch_runs_the_others_in_it_are_answered() -> None:
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder) as embedder:
        both = embedder.embed_nowait(["gone", "shared"])
        twin = embedder.embed_nowait("shared")
        await gate.begun()
        both.cancel()
        gate.let_go(10)
        assert (await twin).tolist() == vector("shared")
        assert at_rest(embedder)


# --- the model fails ---


async def test_embed_out_of_memory_every_waiter_is_answered() -> None:
    def too_large(batch: Batch) -> None:
        if batch.padded_tokens > 12:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    async with AsyncEmbedder(FakeEncoder(on_batch=too_large)) as embedder:
        texts = [f"text {number}" for number in range(30)]
        found = await asyncio.gather(
            *map(embedder.embed, texts), embedder.embed("a b c d " * 8), return_exceptions=True
        )
        assert embedder.statistics().ooms > 0
        assert at_rest(embedder)
    assert [row.tolist() for row in found[:-1]] == [vector(text) for text in texts]  # type: ignore[union-attr]  # no errors
    assert isinstance(found[-1], TextError)
    assert "does not fit into memory even alone" in found[-1].reason


async def test_embed_poison_fails_its_own_request_only() -> None:
    def poisoned(batch: Batch) -> None:
        if any("poison" in chunk.text for chunk in batch.chunks):
            raise ValueError("index out of range")

    async with AsyncEmbedder(FakeEncoder(on_batch=poisoned)) as embedder:
        texts = [f"text {number}" for number in range(20)] + ["poison"]
        found = await asyncio.gather(*map(embedder.embed, texts), return_exceptions=True)
        assert at_rest(embedder)
    assert [row.tolist() for row in found[:-1]] == [vector(text) for text in texts[:-1]]  # type: ignore[union-attr]  # no errors
    assert "the model failed on it: ValueError: index out of range" in str(found[-1])


async def test_embed_text_without_a_vector_leaves_its_own_batch_and_the_embedder_sound() -> None:
    """Its neighbour in request and batch is done too, and nobody wants it any more."""

    class Nan(FakeEncoder):
        def finish(self, handle: Any) -> Any:
            vectors = super().finish(handle)
            vectors[[chunk.text == "nan" for chunk in handle.chunks]] = np.nan
            return vectors

    async with AsyncEmbedder(Nan()) as embedder:
        with pytest.raises(TextError, match="NaN"):
            await embedder.embed(["nan", "heron"])
        assert (await embedder.embed("boat")).tolist() == vector("boat")
        assert at_rest(embedder)


async def test_embed_dead_device_every_waiter_and_every_later_call_is_told() -> None:
    def dead(batch: Batch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with AsyncEmbedder(FakeEncoder(on_batch=dead), max_pending_bytes=8000) as embedder:
        calls = [embedder.embed([f"text {n} {m}" for m in range(5)]) for n in range(5)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in found] == [ModelError] * 5
        assert len(set(map(id, found))) == 5  # an exception of its own for each: tracebacks do not mix
        with pytest.raises(ModelError, match="illegal memory access"):
            await embedder.embed("later")
        assert embedder.statistics().state == "broken"
        assert "broken" in repr(embedder)
        assert at_rest(embedder)


async def test_embed_bug_in_the_tokenizer_thread_reaches_every_waiter() -> None:
    class Broken(FakeEncoder):
        def tokenizer(self) -> Any:
            tokenizer = super().tokenizer()
            probe = tokenizer.tokenize

            def tokenize(texts: list[str]) -> Any:
                if "poison" in texts:
                    return [object()]
                return probe(texts)

            tokenizer.tokenize = tokenize  # type: ignore[method-assign,assignment]  # a fault of this test's own
            return tokenizer

    async with AsyncEmbedder(Broken()) as embedder:
        with pytest.raises(ModelError, match="n_content"):
            await embedder.embed("poison")
        with pytest.raises(ModelError):
            await embedder.embed("heron")


# --- opening and closing ---


async def test_embedder_not_open_or_closed_refuses_calls() -> None:
    embedder = AsyncEmbedder(FakeEncoder())
    assert "new" in repr(embedder)
    with pytest.raises(ClosedError, match="not open: enter it with `async with`"):
        await embedder.embed("heron")
    with pytest.raises(ClosedError, match="not open"):
        embedder.embed_threadsafe("heron")
    async with embedder:
        assert "open" in repr(embedder)
    for call in (embedder.embed_nowait, embedder.embed_threadsafe):
        with pytest.raises(ClosedError, match="closed: it takes no more requests"):
            call("heron")
    with pytest.raises(ClosedError, match="opened once"):
        await embedder.__aenter__()
    await embedder.aclose()


async def test_embedder_never_opened_can_be_closed() -> None:
    embedder = AsyncEmbedder(FakeEncoder())
    await embedder.aclose()
    with pytest.raises(ClosedError):
        await embedder.embed("heron")


async def test_aclose_drains_what_was_asked_for_also_what_waits_for_room() -> None:
    gate, encoder = held_model()
    embedder = await AsyncEmbedder(encoder, max_pending_bytes=4000).__aenter__()
    tasks = [start(embedder.embed(f"text {number}")) for number in range(3)]
    await gate.begun()
    closing = start(embedder.aclose())
    await until(lambda: embedder.statistics().state == "closing")
    with pytest.raises(ClosedError, match="takes no more requests"):
        await embedder.embed("too late")
    gate.let_go(10)
    await closing
    assert [row.tolist() for row in await asyncio.gather(*tasks)] == [vector(f"text {n}") for n in range(3)]
    assert at_rest(embedder)


async def test_aclose_without_draining_refuses_all_that_waits() -> None:
    gate, encoder = held_model()
    embedder = await AsyncEmbedder(encoder, max_pending_bytes=4000).__aenter__()
    tasks = [start(embedder.embed(f"text {number}")) for number in range(3)]
    await gate.begun()
    closing = start(embedder.aclose(drain=False))
    found = await asyncio.gather(*tasks, return_exceptions=True)  # before the batch in hand has ended
    assert [type(error) for error in found] == [ClosedError] * 3
    gate.let_go(10)
    await closing
    assert at_rest(embedder)
    assert len(gate.batches) == 1


async def test_block_left_by_an_exception_refuses_what_waits() -> None:
    gate, encoder = held_model()
    tasks: list[asyncio.Task[Any]] = []

    async def app() -> None:
        async with AsyncEmbedder(encoder) as embedder:
            tasks.append(start(embedder.embed("heron")))
            await gate.begun()
            gate.let_go(10)
            raise KeyError("the app's own")

    with pytest.raises(KeyError):
        await app()
    with pytest.raises(ClosedError):
        await tasks[0]


async def test_aclose_cancelled_while_it_drains_refuses_the_rest() -> None:
    gate, encoder = held_model()
    embedder = await AsyncEmbedder(encoder).__aenter__()
    task = start(embedder.embed("heron"))
    await gate.begun()
    closing = start(embedder.aclose())
    await until(lambda: embedder.statistics().state == "closing")
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(ClosedError):
        await task
    gate.let_go(10)
    await embedder.aclose()


async def test_aclose_cancelled_while_it_drains_answers_everyone_also_from_the_batch_in_hand() -> None:
    """The batch ends in the same turn of the loop: its first answer must not hide that nobody wants the second."""
    gate, encoder = held_model()
    embedder = await AsyncEmbedder(encoder, max_pending_bytes=20_000).__aenter__()
    requests: Any = embedder._requests
    client = requests.client
    in_hand = embedder.embed_nowait(["a heron", "a boat"])
    await gate.begun()
    asked = [in_hand, start(embedder.embed([f"text {n}" for n in range(20)])), start(embedder.embed("reeds"))]
    asked.append(asyncio.wrap_future(embedder.embed_threadsafe("from a thread")))
    await until(lambda: embedder.statistics().pending_requests == 4)
    closing = start(embedder.aclose())
    await until(lambda: embedder.statistics().state == "closing")
    dispatcher: Any = client._engine
    encoder = dispatcher.encoders[0]
    batch = next(iter(encoder._in_hand.values()))
    stop = client.stop

    def stop_as_the_batch_ends() -> None:
        client.settled(dispatcher.scheduler.succeeded(encoder.state, batch, np.ones((2, 4), np.float32)))
        stop()

    client.stop = stop_as_the_batch_ends
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in found] == [ClosedError] * 4
    gate.let_go(10)
    await embedder.aclose()
    assert embedder.statistics().state == "closed"
    assert at_rest(embedder)


class SlowToLoad(FakeEncoder):
    """Tells that it is being loaded, and goes on when it may."""

    def __init__(self, loading: threading.Event, go: threading.Event) -> None:
        super().__init__()
        self._loading, self._go = loading, go

    def tokenizer(self) -> Any:
        self._loading.set()
        assert self._go.wait(60)
        return super().tokenizer()


async def test_embed_while_the_model_loads_waits_for_it() -> None:
    loading, go = threading.Event(), threading.Event()
    embedder = AsyncEmbedder(SlowToLoad(loading, go))
    opening = start(embedder.__aenter__())
    await until(loading.is_set)
    early = start(embedder.embed("heron"))
    from_elsewhere = embedder.embed_threadsafe("boat")
    await until(lambda: embedder.statistics().state == "loading")
    with pytest.raises(OverloadedError, match="still being loaded"):
        embedder.embed_nowait("reeds")
    go.set()
    await opening
    assert (await early).tolist() == vector("heron")
    assert (await asyncio.wrap_future(from_elsewhere)).tolist() == vector("boat")
    await embedder.aclose()


async def test_aclose_while_the_model_loads_ends_the_opening_with_an_error() -> None:
    loading, go = threading.Event(), threading.Event()
    embedder = AsyncEmbedder(SlowToLoad(loading, go))
    opening = start(embedder.__aenter__())
    await until(loading.is_set)
    early = start(embedder.embed("heron"))
    closing = start(embedder.aclose())
    for refused in (opening, early):
        with pytest.raises(ClosedError):
            await refused
    go.set()
    await closing
    assert embedder.statistics().state == "closed"


async def test_open_model_that_cannot_be_loaded_tells_everyone() -> None:
    embedder = AsyncEmbedder("./no/such/model")
    opening = start(embedder.__aenter__())
    await until(lambda: embedder.statistics().state == "loading")
    early = start(embedder.embed("heron"))
    with pytest.raises(ModelError, match="there is no folder"):
        await opening
    with pytest.raises(ModelError, match="there is no folder"):
        await early


# --- other threads and loops ---


async def test_embed_threadsafe_from_many_threads_is_answered_in_each() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:

        def work(number: int) -> list[float]:
            found: list[float] = embedder.embed_threadsafe(f"text {number}").result(timeout=60).tolist()
            return found

        found = await asyncio.gather(*(anyio.to_thread.run_sync(work, number) for number in range(20)))
    assert found == [vector(f"text {number}") for number in range(20)]


async def test_embed_threadsafe_cancelled_drops_the_work() -> None:
    async with busy() as (embedder, gate):
        future = embedder.embed_threadsafe("gone")
        await until(lambda: embedder.statistics().requests == 2)
        assert future.cancel()
        await until(lambda: embedder.statistics().pending_requests == 1)
    assert gate.batches == [["ahead"]]


async def test_embed_awaited_on_another_loop_is_handed_over() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:

        async def elsewhere() -> list[float]:
            with pytest.raises(ClosedError, match="embed_threadsafe is for others"):
                embedder.embed_nowait("heron")
            found: list[float] = (await embedder.embed("heron", deadline_s=60)).tolist()
            return found

        found = await anyio.to_thread.run_sync(lambda: asyncio.run(elsewhere()))
    assert found == vector("heron")


async def test_cancelled_list_is_dropped_in_one_pass_over_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass a text would hold the loop for most of a second with the 10,000 texts that may wait."""
    passes, discard = [], ChunkHeap.discard

    def counted(heap: ChunkHeap, works: Any) -> int:
        passes.append(discard(heap, works))
        return passes[-1]

    monkeypatch.setattr(ChunkHeap, "discard", counted)
    async with busy(batch_size=4) as (embedder, _):
        many = asyncio.ensure_future(embedder.embed([f"text {number}" for number in range(300)]))
        await until(lambda: embedder.statistics().waiting_chunks >= 290)
        many.cancel()
        await asyncio.wait([many])
        await until(lambda: embedder.statistics().waiting_chunks == 0)
    assert len(passes) == 1
    assert passes[0] >= 290


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": 3}, {"prompt": ["x"]}, {"prompt_name": ["q"]}, {"deadline_s": "1"}, {"deadline_s": float("nan")}],
)
async def test_embed_option_of_a_wrong_type_is_refused_and_the_embedder_goes_on(wrong: dict[str, Any]) -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        with pytest.raises(OptionsError, match=next(iter(wrong))):
            await embedder.embed("heron", **wrong)
        assert (await embedder.embed("heron")).shape == (4,)
    with pytest.raises(OptionsError, match="open AsyncEmbedder"):
        embed_stream(["heron"], embedder="x")  # type: ignore[arg-type]  # on purpose
