"""What lies in the place of a per-text file and is none: never waited for, named by readers, replaced by a job."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncembed.cli.store import run
from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.records import text_id
from asyncembed.sinks import JsonStore, open_embeddings

from .making import FINGERPRINT, MADE_WITH, ids, killed_after, opened, record


def _folder(path: Path) -> None:
    path.mkdir()


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def _link(path: Path) -> None:
    path.symlink_to("nowhere")


def _link_to_folder(path: Path) -> None:
    path.symlink_to(path.parent)


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path) -> None:
    cwd = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(cwd)


REPLACED = [_folder, _link, _link_to_folder, _link_to_itself, os.mkfifo, _socket]
Put = Callable[[Path], None]


async def _put(folder: Path, put: Put, *, killed: bool = False) -> Path:
    """Two texts are saved, and the file of "one" is replaced."""
    if killed:
        await killed_after(folder, [record("one"), record("two")])
    else:
        async with opened(folder) as store:
            await store.commit([record("one", "k"), record("two")])
    path = folder / "embeddings_data" / f"{text_id('one')}.json"
    path.unlink()
    put(path)
    return path


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("put", REPLACED)
async def test_job_makes_the_text_again_and_puts_its_file_there(
    tmp_path: Path, put: Put, killed: bool, durable: bool
) -> None:
    path = await _put(tmp_path, put, killed=killed)
    store = JsonStore(tmp_path, durability="power" if durable else "process")
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    assert store.done_before(ids("one", "two")) == [False, True]
    await store.commit([record("one")])
    await store.aclose()
    assert path.is_file()
    assert not path.is_symlink()
    assert open_embeddings(tmp_path)["one"].text == "one"
    async with opened(tmp_path) as again:
        assert again.n_done == 2


@pytest.mark.parametrize("killed", [False, True])
async def test_job_names_a_folder_with_something_in_it_and_saves_the_rest(tmp_path: Path, killed: bool) -> None:
    path = await _put(tmp_path, _full_folder, killed=killed)
    store = JsonStore(tmp_path)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    await store.commit([record("three")])
    with pytest.raises(StoreError, match=f"{path.name}: there is a folder .* move that folder away") as caught:
        await store.commit([record("one")])
    assert "\n" not in str(caught.value)
    await store.aclose()
    assert [entry.name for entry in path.iterdir()] == ["mine"]
    assert not list(path.parent.glob(".*"))
    path.rename(tmp_path / "away")
    async with opened(tmp_path) as again:
        assert again.done_before(ids("one", "two", "three")) == [False, True, True]
        await again.commit([record("one")])


async def test_job_counts_a_link_to_a_file_as_there(tmp_path: Path) -> None:
    await _put(tmp_path, lambda path: path.symlink_to(tmp_path / "elsewhere"))
    async with opened(tmp_path / "other") as store:
        await store.commit([record("one")])
    (tmp_path / "other" / "embeddings_data" / f"{text_id('one')}.json").rename(tmp_path / "elsewhere")
    async with opened(tmp_path) as store:
        assert store.n_done == 2
    assert open_embeddings(tmp_path)["one"].text == "one"


@pytest.mark.parametrize("put", [*REPLACED, _full_folder])
async def test_reader_names_what_is_in_the_place_of_a_file(tmp_path: Path, put: Put) -> None:
    path = await _put(tmp_path, put)
    stored = open_embeddings(tmp_path)
    for look in (lambda: stored["one"], lambda: stored.by_key("k"), stored.to_numpy, lambda: list(stored)):
        with pytest.raises(CorruptRecordError, match=f"{path.name}: it is a .*, not a file; move it away"):
            look()
    assert "one" not in stored  # as for a job, which makes it again
    assert stored["two"].text == "two"


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("put", [*REPLACED, _full_folder])
async def test_verify_reports_it_once_and_removes_all_but_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], put: Put, listed: bool
) -> None:
    path = await _put(tmp_path, put, killed=not listed)
    if not listed:
        (tmp_path / "embeddings_index.journal").unlink()
    assert run(["verify", str(tmp_path)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: it is a ")
    assert last.startswith("2 files read, 1 fault")
    is_folder = put in (_folder, _full_folder)
    assert run(["verify", "--remove-damaged", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == (first if is_folder else f"{first}; removed")
    assert os.path.lexists(path) == is_folder
    assert run(["rebuild", str(tmp_path)]) == is_folder
    assert run(["verify", str(tmp_path)]) == is_folder
