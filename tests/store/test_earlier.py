"""Folders that earlier versions made, kept as they left them: read, gone on with, and never computed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest

from asyncembed.cli.store import run
from asyncembed.errors import StoreError
from asyncembed.records import text_id
from asyncembed.store import Store, open_embeddings

from .making import FINGERPRINT, failure, ids, is_done, opened, record

EARLIER = Path(__file__).with_name("earlier")
TEXTS = {
    "finished": ["one", "two", "drei ü"],
    "failures_and_keys": ["one", "two", "three", "lone \ud800", "worse"],
    "overwritten": ["one", "two"],
    "interrupted": ["early", "late", "bad"],
}
KEYS = {
    "finished": {"a": "one"},
    "failures_and_keys": {"a": "one", "b": "one", "d": "one", "c": "lone \ud800", "moves": "three", "w": "worse"},
    "overwritten": {"a": "one"},
    "interrupted": {"a": "early", "b": "late", "c": "bad"},
}
FAILED = {
    "finished": {},
    "failures_and_keys": {"bad": "too long"},
    "overwritten": {},
    "interrupted": {"worse": "nothing known"},
}
REST = {"torn", "deleted"}  # of the interrupted run: what it had saved, and was damaged and deleted since


@pytest.fixture(params=sorted(TEXTS))
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    shutil.copytree(EARLIER / request.param, tmp_path / "data")
    return str(request.param)


def _state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_reader_reads_it_as_it_is(name: str, tmp_path: Path) -> None:
    before = _state(tmp_path / "data")
    stored = open_embeddings(tmp_path / "data")
    assert stored.fingerprint == FINGERPRINT
    for key, text in KEYS[name].items():
        assert stored.by_key(key).text == text
    assert stored.failures() == {text_id(text): why for text, why in FAILED[name].items()}
    assert set(stored.ids()) - set(ids(*REST)) == set(ids(*TEXTS[name]))
    run(["failures", str(tmp_path / "data")])
    run(["verify", str(tmp_path / "data")])
    assert _state(tmp_path / "data") == before


async def test_job_goes_on_with_it_and_recomputes_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    files = {path.name: path.stat().st_mtime_ns for path in (folder / "embeddings_data").glob("*.json")}
    async with opened(folder) as store:
        assert store.fingerprint == FINGERPRINT
        assert await is_done(store, *TEXTS[name]) == [True] * len(TEXTS[name])
        assert store.n_done == len(TEXTS[name])
        await store.commit([record("new", "n")])
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "embeddings_data").glob("*.json")}
    assert all(after[f"{identity}.json"] == files[f"{identity}.json"] for identity in ids(*TEXTS[name]))
    index = orjson.loads((folder / "embeddings_index.json").read_bytes())
    assert index["version"] == 2  # older releases refuse it from here on
    done = {identity for identity, entry in index["texts"].items() if entry["status"] == "completed"}
    assert done == set(ids(*TEXTS[name], "new"))
    assert sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "errors.jsonl")) == [
        "embeddings_data",
        "embeddings_index.json",
        "ledger.sqlite",
    ]
    stored = open_embeddings(folder)
    assert {key: stored.by_key(key).text for key in KEYS[name]} == KEYS[name]
    assert stored.failures() == {text_id(text): why for text, why in FAILED[name].items()}
    assert run(["verify", str(folder)]) == 0


async def test_job_that_adds_nothing_takes_it_over_once(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with opened(folder):
        pass
    before = _state(folder)
    async with opened(folder) as store:
        await store.commit([record(text, cached=True) for text in TEXTS[name]])
        await store.commit([failure(text, why) for text, why in FAILED[name].items()])
    after = _state(folder)
    assert after.pop("errors.jsonl", b"") == b"" or FAILED[name]
    assert len(after["ledger.sqlite"]) == len(before["ledger.sqlite"])
    assert after["embeddings_index.json"] == before["embeddings_index.json"] or name == "failures_and_keys"


def test_rebuild_takes_it_over(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert run(["rebuild", str(folder)]) == (name == "interrupted")  # which has a torn file
    stored = open_embeddings(folder)
    assert {key: stored.by_key(key).text for key in KEYS[name]} == KEYS[name]
    assert stored.failures() == {text_id(text): why for text, why in FAILED[name].items()}
    assert not (folder / "embeddings_index.journal").exists()


def test_folder_of_a_later_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "finished", tmp_path / "data")
    index = tmp_path / "data" / "embeddings_index.json"
    index.write_bytes(index.read_bytes().replace(b'"version":1', b'"version":3'))
    with pytest.raises(StoreError, match=r"version 3 .* update asyncembed"):
        open_embeddings(tmp_path / "data")


async def test_folder_of_a_later_version_is_refused_by_a_job(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "finished", tmp_path / "data")
    index = tmp_path / "data" / "embeddings_index.json"
    index.write_bytes(index.read_bytes().replace(b'"version":1', b'"version":3'))
    with pytest.raises(StoreError, match=r"version 3 .* update asyncembed"):
        await Store(tmp_path / "data").open()
