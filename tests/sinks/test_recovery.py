"""A folder that a killed run, a full disk or a person left in disorder is put in order at the next open."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from asyncembed.errors import CorruptRecordError, StoreMismatchError
from asyncembed.records import text_id
from asyncembed.sinks import JsonStore

from .making import FINGERPRINT, MADE_WITH, failure, ids, killed_after, opened, record


def _file(folder: Path, text: str) -> Path:
    return folder / "embeddings_data" / f"{text_id(text)}.json"


def _texts(folder: Path) -> dict[str, dict[str, object]]:
    return orjson.loads((folder / "embeddings_index.json").read_bytes())["texts"]


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _forget_origin(folder: Path) -> None:
    """Files as they were before each said what it was made with."""
    for path in (folder / "embeddings_data").glob("*.json"):
        fields = orjson.loads(path.read_bytes())
        del fields["fingerprint"]
        path.write_bytes(orjson.dumps(fields))


def _reformat(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))


def _zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [Path.unlink, _half, _empty, _reformat, _zeros])
@pytest.mark.parametrize("killed", [False, True])
async def test_open_damaged_index_is_made_again(tmp_path: Path, damage: Callable[[Path], None], killed: bool) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record(f"text {n}") for n in range(9)])
    before = _texts(tmp_path)
    if killed:
        await killed_after(tmp_path, [record("late", "k")])
    damage(tmp_path / "embeddings_index.json")
    async with opened(tmp_path) as store:
        assert store.n_done == 9 + killed
        assert store.fingerprint == FINGERPRINT
    after = _texts(tmp_path)
    late = after.pop(text_id("late"), None)
    assert after == before
    assert (late is not None) == killed
    async with opened(tmp_path) as store:
        assert store.n_done == 9 + killed


async def test_open_reformatted_index_keeps_keys_and_failures(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one", "a"), record("one", "b"), failure("bad")])
    before = _texts(tmp_path)
    _reformat(tmp_path / "embeddings_index.json")
    await killed_after(tmp_path, [record("bad", "c")])
    async with opened(tmp_path):
        pass
    assert _texts(tmp_path)[text_id("one")] == before[text_id("one")]
    assert _texts(tmp_path)[text_id("bad")]["status"] == "completed"  # the journal is newer than the index


async def test_open_lost_index_the_journal_still_knows_the_fingerprint(tmp_path: Path) -> None:
    await killed_after(tmp_path, [record("one")])
    (tmp_path / "embeddings_index.json").unlink()
    store = JsonStore(tmp_path)
    await store.open()
    assert (store.fingerprint, store.made_with) == (FINGERPRINT, MADE_WITH)
    with pytest.raises(StoreMismatchError):
        await store.claim({**FINGERPRINT, "weights": "other"}, MADE_WITH)
    await store.aclose()


async def test_open_journal_torn_at_every_byte_of_its_tail_knows_every_text(tmp_path: Path) -> None:
    await killed_after(tmp_path, [record("one"), record("two")], [record("three", "k")])
    journal = tmp_path / "embeddings_index.journal"
    index = (tmp_path / "embeddings_index.json").read_bytes()
    whole = journal.read_bytes()
    for end in range(len(whole) - 300, len(whole) + 1):
        journal.write_bytes(whole[:end])
        (tmp_path / "embeddings_index.json").write_bytes(index)
        async with opened(tmp_path) as store:
            assert store.n_done == 3
        assert set(_texts(tmp_path)) == set(ids("one", "two", "three"))
        assert not journal.exists()


async def test_open_whole_file_that_nobody_recorded_is_adopted(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    await killed_after(tmp_path, [record("two")])
    journal = tmp_path / "embeddings_index.journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])  # killed between rename and append
    async with opened(tmp_path) as store:
        assert store.done_before(ids("one", "two")) == [True, True]
    assert _texts(tmp_path)[text_id("two")]["size"] == _file(tmp_path, "two").stat().st_size


async def test_open_file_copied_into_a_clean_folder_is_adopted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        async with opened(tmp_path / name) as store:
            await store.commit([record(f"text of {name}")])
    _file(tmp_path / "a", "text of b").write_bytes(_file(tmp_path / "b", "text of b").read_bytes())
    async with opened(tmp_path / "a") as store:
        assert store.n_done == 2
    assert len(_texts(tmp_path / "a")) == 2


@pytest.mark.parametrize("damage", [_half, _empty])
@pytest.mark.parametrize("recorded", [True, False])
async def test_open_torn_file_is_removed_and_made_again(
    tmp_path: Path, damage: Callable[[Path], None], recorded: bool
) -> None:
    await killed_after(tmp_path, [record("one"), record("two")])
    if not recorded:
        (tmp_path / "embeddings_index.journal").unlink()
    damage(_file(tmp_path, "one"))
    async with opened(tmp_path) as store:
        assert not _file(tmp_path, "one").exists()
        assert store.done_before(ids("one", "two")) == [False, True]
        await store.commit([record("one")])
    async with opened(tmp_path) as store:
        assert store.n_done == 2


async def test_open_leftover_temporaries_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    data = tmp_path / "embeddings_data"
    left = [data / f".{text_id('x')}.tmp", tmp_path / ".embeddings_index.json.tmp"]
    mine = [data / ".mine.tmp", data / "notes.json", tmp_path / ".mine.tmp"]
    for path in left + mine:
        path.write_text("half")
    async with opened(tmp_path) as store:
        assert store.n_done == 1
    assert [path.exists() for path in left] == [False, False]
    assert [path.exists() for path in mine] == [True, True, True]


async def test_claim_folder_that_lost_its_fingerprint_adopts_this_runs_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two")])
    _forget_origin(tmp_path)
    (tmp_path / "embeddings_index.json").unlink()
    with caplog.at_level(logging.WARNING, "asyncembed"):
        async with opened(tmp_path) as store:
            assert store.fingerprint == FINGERPRINT
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    caplog.clear()
    async with opened(tmp_path) as store:
        assert (store.n_done, store.fingerprint) == (2, FINGERPRINT)
    assert not caplog.records


async def test_claim_folder_that_lost_its_fingerprint_refuses_another_dimension(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    (tmp_path / "embeddings_index.json").unlink()
    store = JsonStore(tmp_path)
    await store.open()
    with pytest.raises(StoreMismatchError, match="vectors of 4 numbers, this run makes 7"):
        await store.claim({"dim": 7}, MADE_WITH)
    await store.aclose()
    async with opened(tmp_path) as again:
        assert again.n_done == 1


async def test_open_file_deleted_after_a_kill_is_made_again(tmp_path: Path) -> None:
    await killed_after(tmp_path, [record("one"), record("two")])
    _file(tmp_path, "one").unlink()
    async with opened(tmp_path) as store:
        assert store.done_before(ids("one", "two")) == [False, True]
    assert list(_texts(tmp_path)) == ids("two")


async def test_claim_folder_that_lost_index_and_journal_knows_its_own_by_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two")])
    (tmp_path / "embeddings_index.json").unlink()
    for _ in range(2):  # the refused run repaired the journal, which must not make the next one trust it
        store = JsonStore(tmp_path)
        await store.open()
        with pytest.raises(StoreMismatchError, match="what its texts say they were made with"):
            await store.claim({**FINGERPRINT, "prompt": "query: "}, MADE_WITH)
        await store.aclose()
    with caplog.at_level(logging.WARNING, "asyncembed"):
        async with opened(tmp_path) as store:
            assert (store.n_done, store.fingerprint) == (2, FINGERPRINT)
    assert not caplog.records


async def test_open_file_of_other_options_copied_into_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as store:
        await store.commit([record("one")])
    async with opened(tmp_path / "b", {**FINGERPRINT, "prompt": "query: "}) as store:
        await store.commit([record("two")])
    stranger = _file(tmp_path / "a", "two")
    stranger.write_bytes(_file(tmp_path / "b", "two").read_bytes())
    with pytest.raises(StoreMismatchError, match=f"{stranger.name}: was made with other weights or options"):
        await JsonStore(tmp_path / "a").open()
    assert stranger.exists()
    stranger.unlink()
    async with opened(tmp_path / "a") as store:
        assert store.n_done == 1


async def test_read_many_file_of_other_options_in_the_place_of_one_is_made_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as store:
        await store.commit([record("one")])
    async with opened(tmp_path / "b", {**FINGERPRINT, "prompt": "query: "}) as store:
        await store.commit([record("one")])
    _file(tmp_path / "a", "one").write_bytes(_file(tmp_path / "b", "one").read_bytes())
    async with opened(tmp_path / "a") as store:
        (found,) = await store.read_many(ids("one"))
        assert isinstance(found, CorruptRecordError)


def _gone(path: Path) -> None:
    path.unlink()


def _kept(path: Path) -> None:
    """Nothing happens to it."""


@pytest.mark.parametrize("to_index", [_kept, _gone, _half, _empty])
@pytest.mark.parametrize("to_journal", [_kept, _gone, _half, _empty])
async def test_open_index_and_journal_damaged_together_every_text_is_found(
    tmp_path: Path, to_index: Callable[[Path], None], to_journal: Callable[[Path], None]
) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record(f"early {n}", f"k{n}") for n in range(7)])
    await killed_after(tmp_path, [record(f"late {n}") for n in range(5)], [failure("bad")])
    to_index(tmp_path / "embeddings_index.json")
    to_journal(tmp_path / "embeddings_index.journal")
    async with opened(tmp_path) as store:
        assert store.n_done == 12
    completed = {identity for identity, entry in _texts(tmp_path).items() if entry["status"] == "completed"}
    assert completed == set(ids(*(f"early {n}" for n in range(7)), *(f"late {n}" for n in range(5))))
    assert not (tmp_path / "embeddings_index.journal").exists()


async def test_open_file_emptied_after_a_clean_end_is_made_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two")])
    _empty(_file(tmp_path, "one"))
    async with opened(tmp_path) as store:
        assert store.done_before(ids("one", "two")) == [False, True]
        await store.commit([record("one")])
    assert set(_texts(tmp_path)) == set(ids("one", "two"))
