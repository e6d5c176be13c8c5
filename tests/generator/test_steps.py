"""The steps, one by one in a loop, leave what the call leaves: files, index and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncembed import (
    Batch,
    CorruptRecordError,
    EmbeddingGenerator,
    ModelError,
    ModelOutOfMemoryError,
    Text,
    embed_stream,
    open_embeddings,
    text_id,
)
from asyncembed.engine.client import WINDOW_CHUNKS
from asyncembed.records import Rejected
from tests.fakes import FakeEncoder
from tests.generator.stepping import by_steps, contents, errors

pytestmark = pytest.mark.usefixtures("no_leftovers")


def both_ways(
    tmp_path: Path, *runs: list[Any], encoder: Callable[[], FakeEncoder] = FakeEncoder
) -> dict[str, list[float] | None]:
    """Do the runs by calls into one folder and by steps into another; after each, both hold the same."""
    called: dict[str, list[float] | None] = {}
    for items in runs:
        called = EmbeddingGenerator(encoder(), save_path=tmp_path / "call")(iter(items))
        stepped = by_steps(EmbeddingGenerator(encoder(), save_path=tmp_path / "steps"), iter(items))
        assert contents(tmp_path / "call") == contents(tmp_path / "steps")
        assert called == stepped
        assert list(called) == list(stepped)
    return called


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "embeddings_index.json").read_text())["texts"]
    return found


def test_every_key_of_a_repeated_text_is_kept(tmp_path: Path) -> None:
    both_ways(tmp_path, [Text("one", "a"), "two", Text("one", "b"), *map(str, range(300)), Text("one", "c")])
    assert index_of(tmp_path / "steps")[text_id("one")]["key"] == ["a", "b", "c"]


def test_another_key_of_a_text_saved_by_an_earlier_run_is_kept(tmp_path: Path) -> None:
    both_ways(tmp_path, [Text("one", "a")], [Text("one", "b"), "two", Text("one", "a")])
    assert index_of(tmp_path / "steps")[text_id("one")]["key"] == ["a", "b"]


def test_item_that_is_no_text_and_text_that_fails_are_in_errors(tmp_path: Path) -> None:
    items = ["one", 5, None, Text(7, key="k"), "", Text("", key="e"), "lone \ud800", b"bytes", "two"]
    both_ways(tmp_path, items)
    found = errors(tmp_path / "steps")
    assert [line["index"] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[0]["reason"] == "item 1 of the input is an int, not a str"
    assert found[2]["key"] == "k"


def test_row_that_is_skipped_has_no_position_but_is_in_errors(tmp_path: Path) -> None:
    both_ways(tmp_path, ["one", Rejected("too few columns", content="x", skipped=True), 5])
    found = errors(tmp_path / "steps")
    assert [line.get("index") for line in found] == [None, 1]
    assert found[1]["reason"].startswith("item 2 of the input")


def test_damaged_file_of_an_earlier_run_is_made_again(tmp_path: Path) -> None:
    texts = ["one", "two", "three"]
    both_ways(tmp_path, texts)
    for name in ("call", "steps"):
        (tmp_path / name / "embeddings_data" / f"{text_id('two')}.json").write_bytes(b"{}  ")
    found = both_ways(tmp_path, [*texts, Text("two", "k")])
    assert all(found[text] is not None for text in texts)
    assert open_embeddings(tmp_path / "steps")["two"].text == "two"
    assert index_of(tmp_path / "steps")[text_id("two")]["key"] == "k"


def test_file_damaged_during_the_run_is_an_error_that_releases_the_lock(tmp_path: Path) -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=tmp_path)
    generator.fill_texts(iter(["one"]))
    chunks = generator.find_best_chunks()
    generator.succeed(chunks, generator.embed(chunks))
    assert generator.save_data() == 1
    (tmp_path / "embeddings_data" / f"{text_id('one')}.json").write_bytes(b"")
    with pytest.raises(CorruptRecordError, match="it is empty"):
        generator.load_average_embeddings_with_fallback()
    assert EmbeddingGenerator(FakeEncoder(), save_path=tmp_path)(["one"])["one"] is not None


@pytest.mark.parametrize("goes_on", ["call", "steps"])
def test_chunk_size_of_the_folder_is_taken_over(tmp_path: Path, goes_on: str) -> None:
    async def begin() -> None:
        await embed_stream(["one"], model=FakeEncoder(), save_path=tmp_path, chunk_size=20)

    asyncio.run(begin())
    generator = EmbeddingGenerator(FakeEncoder(), save_path=tmp_path)
    text = "word " * 50
    found = generator([text]) if goes_on == "call" else by_steps(generator, iter([text]))
    assert found[text] is not None
    assert len(open_embeddings(tmp_path)[text].chunks) == 3


def refuses_poison() -> FakeEncoder:
    def refuse(batch: Batch) -> None:
        if any("poison" in chunk.text for chunk in batch.chunks):
            raise ValueError("cannot take this")

    return FakeEncoder(on_batch=refuse)


def test_text_that_the_model_refuses_fails_alone(tmp_path: Path) -> None:
    items = [*map(str, range(40)), "poison", *map(str, range(40, 80)), Text("poison", "again")]
    found = both_ways(tmp_path, items, encoder=refuses_poison)
    assert [text for text, vector in found.items() if vector is None] == ["poison"]
    reasons = {line["reason"] for line in errors(tmp_path / "steps")}
    assert reasons == {"the model failed on it: ValueError: cannot take this"}


def test_error_of_the_model_comes_out_of_embed_and_does_not_lower_the_limit() -> None:
    generator = EmbeddingGenerator(refuses_poison(), save_path=None)
    generator.fill_texts(iter(["poison", "one", "two", "four"]))
    limit = generator.limit_estimator()
    chunks = generator.find_best_chunks()
    with pytest.raises(ValueError, match="cannot take this") as caught:
        generator.embed(chunks)
    generator.fail(chunks, caught.value)
    assert generator.limit_estimator() == limit
    assert len(generator.find_best_chunks()) == len(chunks) // 2


def test_chunk_that_does_not_fit_alone_fails_its_text_and_the_limit_falls() -> None:
    def full(batch: Batch) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    generator = EmbeddingGenerator(FakeEncoder(on_batch=full), save_path=None)
    generator.fill_texts(iter(["one"]))
    for _ in range(2):  # the second time when other texts have given their memory back
        chunks = generator.find_best_chunks()
        with pytest.raises(ModelOutOfMemoryError):
            generator.embed(chunks)
        generator.fail(chunks)
    assert generator.limit_estimator() < 3
    assert generator.save_data() == 1
    assert generator.load_average_embeddings_with_fallback() == {"one": None}


def test_dead_device_ends_the_steps() -> None:
    def dead(batch: Batch) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(ModelError, match="the device cannot go on"):
        by_steps(EmbeddingGenerator(FakeEncoder(on_batch=dead), save_path=None), iter(["one"]))


def test_model_with_two_batches_at_once_gives_each_its_own_vectors(tmp_path: Path) -> None:
    both_ways(tmp_path, [f"text {'word ' * (number % 20)}" for number in range(100)], encoder=_two_slots)


def _two_slots() -> FakeEncoder:
    return FakeEncoder(slots=2)


class Fixed:
    """An estimator that never changes its mind."""

    def __init__(self, limit: Any) -> None:
        self._limit = limit

    def __call__(self) -> Any:
        return self._limit

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        pass

    def fail(self, n_tokens: int) -> None:
        pass


@pytest.mark.parametrize("limit", [0, -3, 0.5, 40.7])
def test_own_limit_that_cannot_be_still_embeds_everything(limit: Any) -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=None)
    generator.limit_estimator = Fixed(limit)
    found = by_steps(generator, iter(["one", "two words", "three of them"]))
    assert len(found) == 3
    assert None not in found.values()


def test_own_limit_that_never_falls_still_gets_past_out_of_memory() -> None:
    def small(batch: Batch) -> None:
        if batch.padded_tokens > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    generator = EmbeddingGenerator(FakeEncoder(on_batch=small), save_path=None)
    generator.limit_estimator = Fixed(1000)
    assert None not in by_steps(generator, map(str, range(50))).values()


def test_window_is_bounded_in_chunks() -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=None, max_memory_usage="1GB")
    generator.limit_estimator = Fixed(1 << 40)
    assert WINDOW_CHUNKS <= generator.fill_texts(map(str, range(WINDOW_CHUNKS + 1000))) < WINDOW_CHUNKS + 100


@pytest.mark.parametrize("item", ["saved", 5])
def test_filling_stops_where_much_waits_to_be_saved(tmp_path: Path, item: Any) -> None:
    """Nothing of it needs the model, so the window of chunks would never fill."""
    EmbeddingGenerator(FakeEncoder(), save_path=tmp_path)(["saved"])
    with EmbeddingGenerator(FakeEncoder(), save_path=tmp_path, max_memory_usage="1GB") as generator:
        items = iter([item] * 1000)
        assert 0 < generator.fill_texts(items) < 500
        assert generator.fill_texts(items) == 0
        assert generator.save_data() == generator.remove_completed_texts() > 0
        assert generator.n_waiting == 0
        assert generator.fill_texts(items) > 0


def test_error_of_the_iterator_leaves_the_texts_before_it_to_be_embedded(tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield "kept"
        raise LookupError("gone")

    generator = EmbeddingGenerator(FakeEncoder(), save_path=tmp_path)
    with pytest.raises(LookupError, match="gone"):
        generator.fill_texts(failing())
    assert by_steps(generator, iter(()))["kept"] is not None


def test_steps_of_a_static_model_take_all_that_waits_as_the_job_does() -> None:
    class Static(FakeEncoder):
        pads = False

    generator = EmbeddingGenerator(Static(), save_path=None)
    texts = [f"text {'word ' * (number % 7)}{number}" for number in range(60)]
    assert generator.fill_texts(iter(texts)) == 60
    assert len(generator.find_best_chunks()) == 60
    generator.close()
