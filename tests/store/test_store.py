"""The store in use: what a job saves, the next one finds."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import orjson
import pytest

from asyncembed.errors import ClosedError, CorruptRecordError, StoreError, StoreMismatchError
from asyncembed.records import EmbeddedText, Rejected, text_id
from asyncembed.store import Store, StoredText, open_embeddings

from .making import FINGERPRINT, MADE_WITH, failure, ids, is_done, killed_after, opened, record


def _index(path: Path) -> dict[str, object]:
    return orjson.loads((path / "embeddings_index.json").read_bytes())


def _errors(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / "errors.jsonl").read_bytes().splitlines()]


def _names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def _stamps(path: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*.json*")}


def test_store_constructed_touches_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "data")
    assert _names(tmp_path) == []


async def test_store_committed_texts_are_found_by_the_next(tmp_path: Path) -> None:
    async with opened(tmp_path / "data") as store:
        assert (store.n_done, store.fingerprint, store.made_with) == (0, FINGERPRINT, MADE_WITH)
        await store.commit([record("one"), record("two \ud800")])
        await store.commit([record("three")])
        assert await is_done(store, "one") == [False]  # by an earlier run
    async with opened(tmp_path / "data") as store:
        assert store.n_done == 3
        assert await is_done(store, "three", "four", "one") == [True, False, True]
        assert await is_done(store, "four") == [False]
        one, two, four = await store.read_many(ids("one", "two \ud800", "four"))
        assert isinstance(one, StoredText)
        assert isinstance(two, StoredText)
        assert isinstance(four, CorruptRecordError)
        assert (one.text, two.text) == ("one", "two \ud800")
        assert np.array_equal(one.embedding, record("one").embedding)


async def test_store_clean_close_leaves_a_complete_index_and_nothing_else(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one", "k1"), record("two"), failure("bad", "too long", "k2")])
        names = _names(tmp_path)
        assert {"ledger.sqlite-wal", ".lock", ".lock.owner"} <= set(names)
    assert set(_names(tmp_path)) - {".lock"} == {
        "embeddings_data",
        "embeddings_index.json",
        "errors.jsonl",
        "ledger.sqlite",
    }
    index = _index(tmp_path)
    assert list(index) == ["version", "fingerprint", "made_with", "texts", "n_completed"]
    assert (index["version"], index["fingerprint"], index["made_with"]) == (2, FINGERPRINT, MADE_WITH)
    texts = index["texts"]
    assert list(texts) == sorted(ids("one", "two", "bad"))
    size = (tmp_path / "embeddings_data" / f"{text_id('one')}.json").stat().st_size
    assert texts[text_id("one")] == {"status": "completed", "n_tokens": 3, "n_chunks": 1, "key": "k1", "size": size}
    assert texts[text_id("bad")] == {
        "status": "failed",
        "n_tokens": 0,
        "n_chunks": 0,
        "key": "k2",
        "error": "too long",
    }


async def test_store_second_run_that_adds_nothing_rewrites_nothing(tmp_path: Path) -> None:
    """Also where one key came with two texts."""
    async with opened(tmp_path) as store:
        await store.commit([record("one", "k1"), record("two", "k"), record("one", "k2"), record("three", "k")])
        await store.commit([failure("bad", key="k")])
    before, size = _stamps(tmp_path), (tmp_path / "ledger.sqlite").stat().st_size
    for _ in range(3):
        async with opened(tmp_path) as store:
            await store.commit([record("one", "k1", cached=True), record("two", "k", cached=True)])
            await store.commit([record("one", "k2", cached=True), record("three", "k", cached=True)])
            await store.commit([failure("bad", key="k")])
        (tmp_path / "errors.jsonl").unlink()
        assert (tmp_path / "ledger.sqlite").stat().st_size == size
        assert not (tmp_path / "ledger.sqlite-wal").exists()
    assert {name: stamp for name, stamp in before.items() if "errors" not in name} == _stamps(tmp_path)


async def test_store_many_keys_lead_to_one_text(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one", "a"), record("one", "b"), record("one", "a"), record("one")])
        await store.commit([record("one", "c"), record("two")])
    async with opened(tmp_path) as store:
        await store.commit([record("one", "d", cached=True), record("two", "e", cached=True)])
    texts = _index(tmp_path)["texts"]
    assert texts[text_id("one")]["key"] == ["a", "b", "c", "d"]
    assert texts[text_id("two")]["key"] == "e"


async def test_store_duplicate_in_a_run_is_written_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("one")])
        stamp = _stamps(tmp_path / "embeddings_data")
        await store.commit([record("one")])
        assert _stamps(tmp_path / "embeddings_data") == stamp


async def test_store_failed_then_succeeded_is_completed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([failure("bad", key="k")])
        assert _errors(tmp_path) == [
            {
                "index": 7,
                "id": text_id("bad"),
                "key": "k",
                "place": "file.csv:8",
                "reason": "too long",
                "text": "bad",
            }
        ]
    async with opened(tmp_path) as store:
        assert not (tmp_path / "errors.jsonl").exists()
        assert await is_done(store, "bad") == [False]
        await store.commit([record("bad", "k2")])
    entry = _index(tmp_path)["texts"][text_id("bad")]
    assert (entry["status"], entry["key"], "error" in entry) == ("completed", ["k", "k2"], False)


async def test_store_item_that_is_no_text_goes_to_errors_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([EmbeddedText("", 3, None, "", None, error="int is no text", place=None)])
        await store.reject([("a.csv:5", Rejected("not UTF-8", key="x", line=5, content="caf\ud800"))])
        await store.reject([])
    assert [line["reason"] for line in _errors(tmp_path)] == ["int is no text", "not UTF-8"]
    assert _errors(tmp_path)[1] == {"place": "a.csv:5", "key": "x", "reason": "not UTF-8", "content": "caf\ud800"}
    assert _index(tmp_path)["texts"] == {}


async def test_store_damaged_text_made_again_replaces_its_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    path = tmp_path / "embeddings_data" / f"{text_id('one')}.json"
    path.write_bytes(path.read_bytes()[:-9])
    async with opened(tmp_path) as store:
        (found,) = await store.read_many(ids("one"))
        assert isinstance(found, CorruptRecordError)
        await store.commit([record("one")])
        (found,) = await store.read_many(ids("one"))
        assert isinstance(found, StoredText)


async def test_store_deleted_file_is_not_called_completed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two")])
    (tmp_path / "embeddings_data" / f"{text_id('one')}.json").unlink()
    async with opened(tmp_path) as store:
        assert await is_done(store, "one", "two") == [False, True]
    assert list(_index(tmp_path)["texts"]) == ids("two")


async def test_store_other_fingerprint_is_refused_naming_what_differs(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    store = Store(tmp_path)
    await store.open()
    other = {"weights": "x" * 200, "dim": 4, "splitter": {"size": 1}}
    with pytest.raises(StoreMismatchError) as refused:
        await store.claim(other, MADE_WITH)
    await store.aclose()
    message = str(refused.value)
    assert str(tmp_path) in message
    assert 'weights is "abc" there, "xxx' in message
    assert "prompt is null there, not recorded now" in message
    assert 'splitter is not recorded there, {"size":1} now' in message
    assert "dim is" not in message
    assert "overwrite" in message
    assert len(message) < 500 + len(str(tmp_path))


async def test_store_made_with_other_versions_is_not_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    store = Store(tmp_path)
    await store.open()
    await store.claim({**FINGERPRINT, "dim": 4}, {"backend": "other"})
    assert store.made_with == MADE_WITH
    await store.aclose()


async def test_store_folder_without_a_stored_text_takes_another_fingerprint(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([failure("bad")])
    async with opened(tmp_path, {"weights": "new", "dim": 2}) as store:
        await store.commit([record("one", dim=2)])
    assert _index(tmp_path)["fingerprint"] == {"weights": "new", "dim": 2}
    assert list(_index(tmp_path)["texts"]) == ids("one")


async def test_store_overwrite_removes_its_own_files_when_a_text_is_embedded(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), failure("bad")])
    mine = [tmp_path / "notes.txt", tmp_path / "embeddings_data" / "readme.json"]
    for path in mine:
        path.write_text("mine")
    store = Store(tmp_path, overwrite=True)
    await store.open()
    assert (store.n_done, store.fingerprint) == (0, None)
    assert len(open_embeddings(tmp_path)) == 1  # a model that cannot be loaded now would have destroyed nothing
    await store.claim({"weights": "new", "dim": 2}, MADE_WITH)
    await store.commit([failure("worse")])
    assert len(open_embeddings(tmp_path)) == 1  # nor would an input in which nothing is of use
    await store.commit([record("two", dim=2)])
    await store.aclose()
    assert set(_index(tmp_path)["texts"]) == set(ids("two", "worse"))
    assert "worse" in (tmp_path / "errors.jsonl").read_text()
    assert [path.read_text() for path in mine] == ["mine", "mine"]


async def test_store_overwrite_with_failures_only_leaves_the_results_and_says_what_failed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    before = (tmp_path / "embeddings_index.json").read_bytes()
    store = Store(tmp_path, overwrite=True)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    await store.commit([failure("bad")])
    await store.aclose()
    assert (tmp_path / "embeddings_index.json").read_bytes() == before
    assert len(open_embeddings(tmp_path)) == 1
    assert "bad" in (tmp_path / "errors.jsonl").read_text()


async def test_store_overwrite_not_claimed_leaves_the_folder(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    before = _stamps(tmp_path)
    store = Store(tmp_path, overwrite=True)
    await store.open()
    await store.aclose()
    assert _stamps(tmp_path) == before


async def test_store_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    await store.open()
    await store.aclose()
    assert store.path == tmp_path / "data"
    assert (tmp_path / "data").is_dir()


async def test_store_used_before_open_or_after_close_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ClosedError):
        await store.commit([])
    await store.open()
    with pytest.raises(ClosedError):
        await store.open()
    with pytest.raises(AssertionError, match="claimed"):
        await store.commit([record("one")])
    await store.aclose()
    await store.aclose()
    with pytest.raises(ClosedError):
        await store.read_many([])


async def test_store_close_ends_its_thread(tmp_path: Path) -> None:
    async with opened(tmp_path):
        assert "asyncembed-store" in " ".join(thread.name for thread in threading.enumerate())
    assert "asyncembed-store" not in " ".join(thread.name for thread in threading.enumerate())


async def test_store_commit_cancelled_under_way_is_whole_and_lock_is_released(tmp_path: Path) -> None:
    store = Store(tmp_path)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    task = asyncio.ensure_future(store.commit([record(f"text {n}") for n in range(200)]))
    await asyncio.sleep(0)  # the call is in the thread's hands now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    closing = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    async with opened(tmp_path) as again:  # the cancelled close had released the lock before it ended
        assert again.n_done in (0, 200)
        assert len(open_embeddings(tmp_path)) == again.n_done


async def test_store_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    for path in (tmp_path / "data", tmp_path / "data" / "below"):
        store = Store(path)
        with pytest.raises(StoreError, match="has to be a folder"):
            await store.open()
        await store.aclose()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "embeddings_data").write_text("a file")
    with pytest.raises(StoreError, match="has to be a folder"):
        await Store(tmp_path / "other").open()
    assert (tmp_path / "data").read_text() == "a file"


async def test_store_closed_incomplete_leaves_the_ledger_for_the_next(tmp_path: Path) -> None:
    await killed_after(tmp_path, [record("one", "k"), failure("bad")])
    assert _index(tmp_path)["texts"] == {}
    async with opened(tmp_path) as store:
        assert store.n_done == 1
    assert set(_index(tmp_path)["texts"]) == set(ids("one", "bad"))
    assert _index(tmp_path)["texts"][text_id("one")]["key"] == "k"
