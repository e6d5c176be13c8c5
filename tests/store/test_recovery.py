"""A folder that a killed run, a full disk or a person left in disorder is put in order at the next open."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import orjson
import pytest

from asyncembed.errors import CorruptRecordError, StoreError, StoreMismatchError
from asyncembed.records import text_id
from asyncembed.store import Store

from .making import FINGERPRINT, MADE_WITH, failure, ids, is_done, killed_after, opened, record


def _file(folder: Path, text: str) -> Path:
    return folder / "embeddings_data" / f"{text_id(text)}.json"


def _texts(folder: Path) -> dict[str, dict[str, object]]:
    return orjson.loads((folder / "embeddings_index.json").read_bytes())["texts"]


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _forget(folder: Path) -> None:
    """The folder loses what says how its texts were made."""
    (folder / "ledger.sqlite").unlink()
    (folder / "embeddings_index.json").unlink()


def _forget_origin(folder: Path) -> None:
    """Files as they were before each said what it was made with."""
    for path in (folder / "embeddings_data").glob("*.json"):
        fields = orjson.loads(path.read_bytes())
        del fields["fingerprint"]
        path.write_bytes(orjson.dumps(fields))


def _zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def _other_bytes(path: Path) -> None:
    path.write_bytes(b"no database\n" * 700)


def _spoil_pages(path: Path) -> None:
    """The first page, which a look at the folder reads, is whole; what the rows are in is not."""
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))


def _spoil_schema(path: Path) -> None:
    """SQLite quotes it in its errors, and it is no UTF-8."""
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE", b"CREATE T\xb2BLE"))


def _kept(path: Path) -> None:
    """Nothing happens to it."""


DAMAGES = [_kept, Path.unlink, _half, _empty, _zeros, _other_bytes, _spoil_pages, _spoil_schema]


@pytest.mark.parametrize("to_index", [_kept, Path.unlink, _half])
@pytest.mark.parametrize("to_ledger", DAMAGES)
@pytest.mark.parametrize("killed", [False, True])
async def test_open_damaged_ledger_and_index_are_made_again(
    tmp_path: Path, to_ledger: Callable[[Path], None], to_index: Callable[[Path], None], killed: bool
) -> None:
    texts = [f"text {n}" for n in range(9)]
    async with opened(tmp_path) as store:
        await store.commit([record(text, "k" + text) for text in texts])
        await store.commit([failure("bad", "too long", "b")])
    before = _texts(tmp_path)
    if killed:
        texts.append("late")
        await killed_after(tmp_path, [record("late", "k")])
    to_ledger(tmp_path / "ledger.sqlite")
    to_index(tmp_path / "embeddings_index.json")
    async with opened(tmp_path) as store:
        assert store.n_done == len(texts)
        assert store.fingerprint == FINGERPRINT
    after = _texts(tmp_path)
    assert {identity for identity, entry in after.items() if entry["status"] == "completed"} == set(ids(*texts))
    if to_index is _kept:  # it has keys and failures of finished runs
        assert {identity: after[identity] for identity in before} == before
    assert {identity: entry["size"] for identity, entry in after.items() if "size" in entry} == {
        identity: _size(tmp_path, identity) for identity in ids(*texts)
    }
    async with opened(tmp_path) as store:
        assert store.n_done == len(texts)


def _size(folder: Path, identity: str) -> int:
    return (folder / "embeddings_data" / f"{identity}.json").stat().st_size


async def test_open_ledger_of_another_folder_is_put_in_order_or_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        async with opened(tmp_path / name) as store:
            await store.commit([record("shared"), record(f"text of {name}", name), failure(f"bad in {name}")])
    async with opened(tmp_path / "c", {**FINGERPRINT, "prompt": "query: "}) as store:
        await store.commit([record("shared")])
    shutil.copy(tmp_path / "b" / "ledger.sqlite", tmp_path / "a")
    async with opened(tmp_path / "a") as store:
        assert await is_done(store, "shared", "text of a", "text of b") == [True, True, False]
    assert set(_texts(tmp_path / "a")) >= set(ids("shared", "text of a"))
    assert text_id("text of b") not in _texts(tmp_path / "a")
    shutil.copy(tmp_path / "c" / "ledger.sqlite", tmp_path / "a")
    with pytest.raises(StoreMismatchError, match="made with other weights or options"):
        async with opened(tmp_path / "a"):
            pass


async def test_open_ledger_damaged_while_a_job_ran_loses_no_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    await store.commit([record("one")])
    (tmp_path / "ledger.sqlite").write_bytes(b"\xa5" * 20_000)
    os.truncate(tmp_path / "ledger.sqlite-wal", 0)
    with suppress(StoreError):  # as soon as it reads a page again
        for n in range(30):
            await store.commit([record(f"{n} {m}") for m in range(64)])
    await store.aclose()
    n_files = len(list((tmp_path / "embeddings_data").glob("*.json")))
    async with opened(tmp_path) as again:
        assert again.n_done == n_files


async def test_open_whole_file_that_nobody_recorded_is_adopted(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    await killed_after(tmp_path, [record("two")])
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as ledger:
        ledger.execute("delete from log where id = ?", (bytes.fromhex(text_id("two")),))  # killed before the append
    async with opened(tmp_path) as store:
        assert await is_done(store, "one", "two") == [True, True]
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
        (tmp_path / "ledger.sqlite").unlink()
    damage(_file(tmp_path, "one"))
    async with opened(tmp_path) as store:
        assert not _file(tmp_path, "one").exists()
        assert await is_done(store, "one", "two") == [False, True]
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
    _forget(tmp_path)
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
    _forget(tmp_path)
    store = Store(tmp_path)
    await store.open()
    with pytest.raises(StoreMismatchError, match="4 numbers there, 7 here"):
        await store.claim({"dim": 7}, MADE_WITH)
    await store.aclose()
    async with opened(tmp_path) as again:
        assert again.n_done == 1


async def test_open_file_deleted_after_a_kill_is_made_again(tmp_path: Path) -> None:
    await killed_after(tmp_path, [record("one"), record("two")])
    _file(tmp_path, "one").unlink()
    async with opened(tmp_path) as store:
        assert await is_done(store, "one", "two") == [False, True]
    assert list(_texts(tmp_path)) == ids("two")


async def test_claim_folder_that_lost_ledger_and_index_knows_its_own_by_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two")])
    _forget(tmp_path)
    for _ in range(2):  # the refused run repaired the ledger, which must not make the next one trust it
        store = Store(tmp_path)
        await store.open()
        with pytest.raises(
            StoreMismatchError, match="2 of 2 files were made with other weights or options than this run"
        ):
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
        await Store(tmp_path / "a").open()
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


async def test_open_file_emptied_after_a_clean_end_is_made_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two")])
    _empty(_file(tmp_path, "one"))
    async with opened(tmp_path) as store:
        assert await is_done(store, "one", "two") == [False, True]
        await store.commit([record("one")])
    assert set(_texts(tmp_path)) == set(ids("one", "two"))
