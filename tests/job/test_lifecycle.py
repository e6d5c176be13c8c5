"""However a stream ends, it closes cleanly: no task, no thread, no reserved byte, no warning is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asyncembed.job.job as job_module
from asyncembed import (
    AsyncEmbedder,
    AsyncEmbedError,
    ClosedError,
    OptionsError,
    StoreLockedError,
    StoreMismatchError,
    Text,
    embed_stream,
)
from asyncembed.store.writer import FolderWriter
from tests.conftest import all_tasks_done
from tests.fakes import FakeEncoder

pytestmark = pytest.mark.usefixtures("no_leftovers")


def numbered(n: int) -> list[str]:
    return [f"text number {i}" for i in range(n)]


async def from_list(texts: list[str]) -> AsyncIterator[str]:
    for text in texts:
        yield text


async def endless() -> AsyncIterator[str]:
    number = 0
    while True:
        yield f"text number {number}"
        number += 1


def reserved(stream: Any) -> tuple[int, int]:
    now = stream._job.admission.statistics()
    return now.reserved_bytes, now.n_in_flight


async def test_awaiting_a_list_gives_a_dictionary_in_input_order(model: Any) -> None:
    stream = embed_stream(["pear", "apple", "pear"], model=model, save_path=None)
    vectors = await stream
    assert list(vectors) == ["pear", "apple"]
    assert all(v.shape == (384,) and v.dtype == np.float32 for v in vectors.values())
    assert reserved(stream) == (0, 0)
    await all_tasks_done()


async def test_iterating_an_async_generator_gives_each_text_once(model: Any) -> None:
    texts = numbered(40)
    seen = [record.index async for record in embed_stream(from_list(texts), model=model, save_path=None)]
    assert sorted(seen) == list(range(40))
    await all_tasks_done()


async def test_break_half_way_closes_everything(model: Any) -> None:
    stream = embed_stream(endless(), model=model, save_path=None, batch_size=8)
    n_seen = 0
    async for _ in stream:
        n_seen += 1
        if n_seen == 20:
            break
    await all_tasks_done()
    assert reserved(stream) == (0, 0)


async def test_leaving_the_block_half_way_closes_everything(model: Any, tmp_path: Path) -> None:
    async with embed_stream(endless(), model=model, save_path=tmp_path, batch_size=8) as stream:
        async for _ in stream:
            break
        await asyncio.sleep(0)  # the loop begins to close the generator that was left
    assert stream._driver.done()
    assert reserved(stream) == (0, 0)
    async with embed_stream(["again"], model=model, save_path=tmp_path) as again:  # the lock is free
        await again


async def test_cancellation_half_way_closes_everything(model: Any, tmp_path: Path) -> None:
    stream = embed_stream(endless(), model=model, save_path=tmp_path, batch_size=8)
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            begun.set()

    task = asyncio.get_running_loop().create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert reserved(stream) == (0, 0)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_exception_in_the_source_comes_out_unchanged_after_the_texts_before_it(model: Any, kind: str) -> None:
    boom = LookupError("the database went away")

    def failing() -> Iterator[str]:
        yield from numbered(5)
        raise boom

    async def failing_async() -> AsyncIterator[str]:
        for text in numbered(5):
            yield text
        raise boom

    stream = embed_stream(failing() if kind == "sync" else failing_async(), model=model, save_path=None)
    seen = []
    with pytest.raises(LookupError) as caught:  # noqa: PT012  # the loop is what raises
        async for record in stream:
            seen.append(record.index)
    assert caught.value is boom
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert reserved(stream) == (0, 0)
    await all_tasks_done()


async def test_blocking_generator_never_blocks_the_loop(model: Any) -> None:
    """The generator waits until the loop has ticked a hundred times: it would wait for ever on the loop's thread."""
    ticked = threading.Event()

    def blocking() -> Iterator[str]:
        yield "before"
        assert ticked.wait(60)
        yield "after"

    async def heartbeat() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        ticked.set()

    beating = asyncio.get_running_loop().create_task(heartbeat())
    vectors = await embed_stream(blocking(), model=model, save_path=None)
    await beating
    assert list(vectors) == ["before", "after"]


async def test_slow_reader_slows_the_source() -> None:
    """Nobody reads on: the source is not pulled beyond what the budget holds."""
    pulled = 0

    def source() -> Iterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield f"text number {pulled}"

    stream = embed_stream(source(), model=FakeEncoder(), save_path=None, max_memory_usage=200_000)
    async with stream:
        async for _ in stream:
            break_at = pulled
            for _ in range(2000):  # the loop turns, and nobody takes a record
                await asyncio.sleep(0)
            assert stream._job.admission.statistics().n_waiting == 1
            assert pulled <= 200_000 // 1500 + 2 * 256 + 2
            assert break_at > 0
            break


async def test_stop_finishes_the_batch_in_hand_and_ends(tmp_path: Path) -> None:
    stream = embed_stream(endless(), model=FakeEncoder(), save_path=tmp_path)
    n_seen = 0
    async for _ in stream:
        n_seen += 1
        if n_seen == 10:
            stream.stop()
    summary = stream.summary
    assert summary.stopped
    assert summary.texts == n_seen == summary.embedded + summary.duplicates
    assert reserved(stream) == (0, 0)
    n_files = len(list((tmp_path / "embeddings_data").glob("*.json")))
    assert n_files == summary.embedded


async def test_stop_before_the_model_is_loaded_ends_without_results(tmp_path: Path) -> None:
    stream = embed_stream(numbered(3), model=FakeEncoder(), save_path=tmp_path)
    runner = asyncio.get_running_loop().create_task(stream.run())
    await asyncio.sleep(0)
    stream.stop()
    summary = await runner
    assert summary.stopped


async def test_ordered_gives_input_order_under_a_tiny_budget() -> None:
    """The long text at the head of the line holds all others back, and the budget is full: it still comes."""
    texts = [("word " * (60 if i % 7 == 0 else 1 + i % 3)) + str(i) for i in range(400)]
    stream = embed_stream(texts, model=FakeEncoder(), save_path=None, ordered=True, max_memory_usage=20_000)
    assert [record.index async for record in stream] == list(range(400))


async def test_every_text_failed_raises_with_the_reason(model: Any) -> None:
    with pytest.raises(AsyncEmbedError, match=r"^the text could not be embedded: the text has no tokens"):
        await embed_stream([""], model=FakeEncoder(), save_path=None)
    with pytest.raises(AsyncEmbedError, match=r"none of the 2 texts could be embedded.*no tokens"):
        await embed_stream(["", "  \n"], model=model, save_path=None)


async def test_on_error_raise_names_the_text(model: Any) -> None:
    with pytest.raises(AsyncEmbedError, match="text 1 cannot be embedded: the text has no tokens"):
        await embed_stream(["good", " "], model=model, save_path=None, on_error="raise")


async def test_item_that_is_no_text_is_a_failed_record_with_its_position(model: Any) -> None:
    stream = embed_stream(["good", 5, None, b"bytes"], model=model, save_path=None)
    vectors = await stream
    assert list(vectors) == ["good"]
    assert [failure.index for failure in stream.failures] == [1, 2, 3]
    assert "item 1 of the input is an int" in stream.failures[0].error


async def test_stream_is_used_once(model: Any) -> None:
    stream = embed_stream(["once"], model=model, save_path=None)
    await stream
    with pytest.raises(ClosedError):
        await stream
    with pytest.raises(ClosedError):
        aiter(stream)


async def test_keys_travel_with_their_texts(model: Any, tmp_path: Path) -> None:
    source = [Text("pear", key="a"), Text("apple", key="b"), Text("pear", key="c")]
    records = [record async for record in embed_stream(source, model=model, save_path=tmp_path)]
    assert {record.key: record.text for record in records} == {"a": "pear", "b": "apple", "c": "pear"}


def test_single_str_is_refused() -> None:
    with pytest.raises(OptionsError, match="one text"):
        embed_stream("not a list")


def test_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(OptionsError, match="'batchsize'"):
        embed_stream([], batchsize=3)


async def test_second_writer_in_one_process_is_refused(tmp_path: Path) -> None:
    async with embed_stream(endless(), model=FakeEncoder(), save_path=tmp_path) as first:
        async for _ in first:
            with pytest.raises(StoreLockedError):
                await embed_stream(["x"], model=FakeEncoder(), save_path=tmp_path)
            break


async def test_source_that_raises_cancelled_error_is_an_error_and_no_end() -> None:
    """A pool that was closed under the source cancels what it waits for: that must not look like the end."""

    async def pooled() -> AsyncIterator[str]:
        yield "a"
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    with pytest.raises(RuntimeError, match="CancelledError"):
        await embed_stream(pooled(), model=FakeEncoder(), save_path=None)


async def test_source_that_swallows_cancellation_does_not_hold_up_closing() -> None:
    async def stubborn() -> AsyncIterator[str]:
        number = 0
        while True:
            try:
                number += 1
                yield f"text {number}"
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass

    async with embed_stream(stubborn(), model=FakeEncoder(), save_path=None) as stream:
        async for _ in stream:
            break
    await all_tasks_done()


async def test_computed_results_do_not_pile_up_before_the_writer(tmp_path: Path) -> None:
    """The store's thread is held: the model stops after a commit's worth of texts and two batches."""
    release = threading.Event()
    encoder = FakeEncoder()
    texts = numbered(1500)
    stream = embed_stream(texts, model=encoder, save_path=tmp_path, batch_size=16)
    async with stream:
        held = False
        async for _ in stream:
            if not held:
                held = True
                stream._job._store._worker.submit(release.wait, 60)
                rows_before = -1
                while rows_before != encoder.rows:  # until the model rests
                    rows_before = encoder.rows
                    for _ in range(300):
                        await asyncio.sleep(0)
                n_saved = stream._job.summary.texts
                n_ahead = encoder.rows - n_saved
                release.set()
    assert encoder.rows == 1500
    assert n_ahead <= 256 + 2 * 16  # a commit's worth, and the batches that were under way by then


async def test_bad_texts_in_a_row_fail_alone_where_the_model_is_sound() -> None:
    def refuses(batch: Any) -> None:
        if any("bad" in chunk.text for chunk in batch.chunks):
            raise ValueError("no")

    texts = [f"good {i}" for i in range(100)] + [f"bad one two three {i}" for i in range(60)]
    stream = embed_stream(texts, model=FakeEncoder(on_batch=refuses), save_path=None)
    vectors = await stream
    assert sum(vector is None for vector in vectors.values()) == 60


async def test_stop_requested_before_the_start_is_kept(tmp_path: Path) -> None:
    stream = embed_stream(numbered(500), model=FakeEncoder(), save_path=tmp_path)
    stream.stop()
    assert (await stream.run()).stopped
    finished = embed_stream(["a"], model=FakeEncoder(), save_path=tmp_path)
    await finished
    finished.stop()
    assert not finished.summary.stopped


async def test_stop_computes_no_more_than_the_batch_in_hand() -> None:
    encoder = FakeEncoder()
    stream = embed_stream(endless(), model=encoder, save_path=None, batch_size=4)
    async with stream:
        async for _ in stream:
            rows = encoder.rows
            stream.stop()
            break
    await all_tasks_done()
    assert encoder.rows <= rows + 3 * 4


async def test_ordered_results_of_a_stopped_run_are_all_delivered() -> None:
    stream = embed_stream(endless(), model=FakeEncoder(), save_path=None, ordered=True)
    seen = []
    async for record in stream:
        seen.append(record.index)
        if len(seen) == 50:
            stream.stop()
    assert seen == sorted(seen)
    assert stream.summary.texts == len(seen)


async def test_estimator_that_says_nothing_useful_does_not_hang() -> None:
    from asyncembed.job import JobParts
    from asyncembed.options import EmbedOptions
    from asyncembed.stream import EmbedStream

    class Zero:
        def __call__(self) -> int:
            return 0

        def succeed(self, n_tokens: int, seconds: float | None = None) -> None: ...

        def fail(self, n_tokens: int) -> None: ...

    options = EmbedOptions(model=FakeEncoder(), save_path=None)
    assert len(await EmbedStream(numbered(20), options, JobParts(estimator=Zero()))) == 20


async def test_closing_from_another_task_is_a_closed_error(tmp_path: Path) -> None:
    stream = embed_stream(endless(), model=FakeEncoder(), save_path=None)
    running = asyncio.get_running_loop().create_task(stream.run())
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(ClosedError):
        await running


async def test_number_as_a_key_is_kept_as_its_digits_and_another_type_fails_its_text(tmp_path: Path) -> None:
    source = [Text("a", key=7), Text("b", key=object()), Text("a", key=8)]  # type: ignore[arg-type]
    stream = embed_stream(source, model=FakeEncoder(), save_path=tmp_path)
    records = [record async for record in stream]
    assert {record.key for record in records if record.error is None} == {"7", "8"}
    assert "the key of item 1" in stream.failures[0].error


async def test_prompt_on_a_folder_without_one_is_a_mismatch_that_names_it(tmp_path: Path) -> None:
    await embed_stream(["a"], model=FakeEncoder(), save_path=tmp_path)
    other = FakeEncoder()
    other.prompt = "query: "
    with pytest.raises(StoreMismatchError, match="prompt"):
        await embed_stream(["b"], model=other, save_path=tmp_path)


async def test_refused_run_leaves_the_errors_of_the_last_one(tmp_path: Path) -> None:
    await embed_stream(["a", ""], model=FakeEncoder(), save_path=tmp_path)
    assert (tmp_path / "errors.jsonl").exists()
    with pytest.raises(StoreMismatchError):
        await embed_stream(["b"], model=FakeEncoder(dim=5), save_path=tmp_path)
    assert (tmp_path / "errors.jsonl").exists()


async def test_option_about_files_is_refused_with_where_it_belongs() -> None:
    with pytest.raises(OptionsError, match="read_texts"):
        embed_stream(["a"], column="text")


async def test_encoder_of_a_user_gives_float32_whatever_it_returns() -> None:
    class Double(FakeEncoder):
        def finish(self, handle: Any) -> Any:
            return super().finish(handle).astype(np.float64)

    vectors = await embed_stream(["a"], model=Double(), save_path=None)
    assert vectors["a"].dtype == np.float32


async def test_more_dimensions_than_there_are_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    encoder = FakeEncoder(dim=4)
    with pytest.raises(OptionsError, match="truncate_dim=5 is more than the 4 dimensions"):
        await embed_stream(["a"], model=encoder, save_path=tmp_path, truncate_dim=5)
    async with AsyncEmbedder(encoder) as embedder:
        with pytest.raises(OptionsError, match="truncate_dim=5 is more than the 4 dimensions"):
            await embed_stream(["a"], embedder=embedder, save_path=tmp_path, truncate_dim=5)
    assert encoder.rows == 0
    assert not list(tmp_path.rglob("*.json"))


async def test_live_model_that_truncates_gives_what_its_encode_gives(model: Any, tmp_path: Path) -> None:
    model.truncate_dim = 64
    try:
        vectors = await embed_stream(["a boat"], model=model, save_path=tmp_path)
        expected = model.encode(["a boat"])
    finally:
        model.truncate_dim = None
    np.testing.assert_allclose(vectors["a boat"], expected[0], atol=1e-5)


async def test_model_loads_while_the_folder_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)
    load, scan = job_module.load_all, FolderWriter.scan

    def loading(*arguments: Any) -> Any:
        both.wait()
        return load(*arguments)

    def scanning(writer: FolderWriter) -> None:
        both.wait()
        scan(writer)

    await embed_stream(["one", "two"], model=FakeEncoder(), save_path=tmp_path)
    monkeypatch.setattr(job_module, "load_all", loading)
    monkeypatch.setattr(FolderWriter, "scan", scanning)
    summary = await embed_stream(["one", "two", "three"], model=FakeEncoder(), save_path=tmp_path).run()
    assert (summary.cached, summary.embedded) == (2, 1)
