"""The command that looks after a folder: what is wrong is found, named, and put right."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from asyncembed.cli.store import run
from asyncembed.errors import StoreMismatchError
from asyncembed.records import text_id
from asyncembed.store import open_embeddings
from asyncembed.store.files import StorePaths
from asyncembed.store.lock import FolderLock
from tests.conftest import ROOT
from tests.store.making import FINGERPRINT, failure, killed_after, opened, record


def file_of(folder: Path, text: str) -> Path:
    return folder / "embeddings_data" / f"{text_id(text)}.json"


def texts_of(folder: Path) -> dict[str, dict[str, object]]:
    return orjson.loads((folder / "embeddings_index.json").read_bytes())["texts"]


async def fill(folder: Path) -> None:
    async with opened(folder) as store:
        await store.commit([record(f"text {n}", f"k{n}") for n in range(5)])
        await store.commit([failure("bad", "too long", "kb"), record("text 1", "other")])


def forget(folder: Path) -> None:
    """The folder loses what says how its texts were made."""
    (folder / "ledger.sqlite").unlink()
    (folder / "embeddings_index.json").unlink()


async def pass_over(folder: Path) -> None:
    """A job with the options that made the folder, and no texts."""
    async with opened(folder):
        pass


def _change(**fields: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **fields}))

    return change


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


FAULTS = [
    (_half, "cannot be read back"),
    (_empty, "it is empty"),
    (_change(embedding=["a; delete b"]), "could not convert string to float: 'a; delete b')"),
    (_change(text="another"), "not the one that its name says"),
    (_change(embedding=[1.0, 2.0]), "its vector has 2 numbers, the folder's have 4"),
    (_change(embedding=[1.0, 2.0, 3.0, 1e300]), "empty or not finite"),
    (_change(fingerprint="0" * 16), "made with other weights or options"),
    (_change(n_tokens=99), "its n_tokens is 99, the ledger says 3"),
    (_change(chunks=[]), "it has no chunks"),
]


@pytest.mark.parametrize(("damage", "words"), FAULTS)
async def test_verify_finds_each_kind_of_damage_and_removes_it_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: str
) -> None:
    await fill(tmp_path)
    assert run(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "5 files read, 0 faults\n"
    damage(file_of(tmp_path, "text 2"))
    assert run(["verify", str(tmp_path)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(str(file_of(tmp_path, "text 2")))
    assert words in first
    assert last == "5 files read, 1 fault"

    assert run(["verify", "--remove-damaged", str(tmp_path)]) == 1
    assert "; removed" in capsys.readouterr().out
    assert not file_of(tmp_path, "text 2").exists()
    assert run(["verify", str(tmp_path)]) == 0
    async with opened(tmp_path) as store:  # computed anew by the next run, and only that
        done = [found.is_done for found in await store.find([f"text {n}" for n in range(5)])]
        assert done == [True, True, False, True, True]
    assert texts_of(tmp_path)[text_id("text 1")]["key"] == ["k1", "other"]


async def test_verify_of_missing_file_torn_index_and_lost_ledger_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path)
    file_of(tmp_path, "text 0").unlink()
    assert run(["verify", str(tmp_path), "--json"]) == 1
    fault, numbers = map(json.loads, capsys.readouterr().out.splitlines())
    assert "is gone" in fault["reason"]
    assert numbers == {"files": 4, "faults": 1, "removed": 0, "unlisted": 0}
    _half(tmp_path / "embeddings_index.json")
    assert run(["verify", str(tmp_path)]) == 1
    assert "embeddings_index.json: is torn; asyncembed-store rebuild" in capsys.readouterr().out
    _half(tmp_path / "ledger.sqlite")
    assert run(["verify", str(tmp_path)]) == 1
    assert "ledger.sqlite: is gone or cannot be read; asyncembed-store rebuild" in capsys.readouterr().out
    forget(tmp_path)
    assert run(["verify", str(tmp_path)]) == 1
    assert "is gone or cannot be read, and with it what the texts were made with" in capsys.readouterr().out


def test_folder_of_two_kinds_without_ledger_and_index_is_reported_and_nothing_whole_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(fill(tmp_path))
    forget(tmp_path)
    stray, old, torn = (file_of(tmp_path, f"text {n}") for n in range(3))
    _change(embedding=[1.0, 2.0, 3.0], fingerprint="0" * 16)(stray)
    _change(fingerprint=None)(old)  # of a version whose files do not say it
    _half(torn)
    assert run(["verify", "--remove-damaged", "--json", str(tmp_path)]) == 1
    *faults, numbers = map(json.loads, capsys.readouterr().out.splitlines())
    assert [fault["path"] for fault in faults if fault["removed"]] == [str(torn)]
    assert numbers["removed"] == 1
    (mixed,) = [fault for fault in faults if "ways" in fault["reason"]]
    assert "its files were made in 3 ways, 2 as " in mixed["reason"]
    assert f"1 as {stray} (3 numbers)" in mixed["reason"]

    with pytest.raises(StoreMismatchError, match=rf"1 of 4 files was .*, such as {stray} \(3 numbers there, 4 here\)"):
        asyncio.run(pass_over(tmp_path))
    stray.unlink()  # what the message says
    asyncio.run(pass_over(tmp_path))
    assert run(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("content", [b"", b"\x93\x00\xff{]" * 50, b"[1, 2]", b"{}", b'{"version":1,"texts":{\n'])
def test_ledger_and_index_that_cannot_be_read_are_one_fault_with_advice_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    asyncio.run(fill(tmp_path))
    for name in ("ledger.sqlite", "embeddings_index.json"):
        (tmp_path / name).write_bytes(content)
    assert run(["verify", str(tmp_path)]) == 1
    fault, _ = capsys.readouterr().out.splitlines()
    assert fault.startswith(
        f"{tmp_path}/ledger.sqlite: is gone or cannot be read, and with it what the texts were made"
    )
    assert run(["rebuild", str(tmp_path)]) == 3
    assert "cannot be read, so nothing says what its texts were made with; run a job" in capsys.readouterr().err
    asyncio.run(pass_over(tmp_path))
    assert run(["verify", str(tmp_path)]) == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("damage", [_empty, _cut, Path.unlink])
async def test_failures_of_a_ledger_that_cannot_be_read_are_perhaps_not_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], json_too: bool
) -> None:
    await fill(tmp_path)
    damage(tmp_path / "ledger.sqlite")
    assert run(["failures", str(tmp_path), *["--json"] * json_too]) == 1
    out = capsys.readouterr().out
    assert "of 1 text it is known" in out.splitlines()[-1]  # the index names it
    assert text_id("bad") in out
    if json_too:
        assert [json.loads(line) for line in out.splitlines()][-1]["path"] == str(tmp_path / "ledger.sqlite")


@pytest.mark.parametrize("name", ["n_tokens", "n_chunks"])
async def test_verify_blames_the_ledger_where_the_file_is_as_it_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    await fill(tmp_path)
    before = (tmp_path / "embeddings_index.json").read_bytes()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as ledger:
        ledger.execute(f"update log set {name} = 9 where seq = 1")
    assert run(["verify", "--remove-damaged", str(tmp_path)]) == 1
    fault, last = capsys.readouterr().out.splitlines()
    assert fault.startswith(f"{tmp_path}/ledger.sqlite: says that {name} of ")
    assert fault.endswith(
        f"is 9, its file says {3 if name == 'n_tokens' else 1}; asyncembed-store rebuild makes it anew"
    )
    assert last == "5 files read, 1 fault"
    assert run(["rebuild", str(tmp_path)]) == 0
    assert run(["verify", str(tmp_path)]) == 0
    assert (tmp_path / "embeddings_index.json").read_bytes() == before


async def test_verify_of_a_killed_run_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await killed_after(tmp_path, [record("one"), failure("bad")])
    assert run(["verify", str(tmp_path)]) == 0
    assert "1 file read, 0 faults" in capsys.readouterr().out


@pytest.mark.parametrize("json_too", [False, True])
async def test_failures_lists_each_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], json_too: bool
) -> None:
    await fill(tmp_path)
    await killed_after(tmp_path, [failure("worse", "no vector")])
    assert run(["failures", str(tmp_path), *["--json"] * json_too]) == 0
    lines = capsys.readouterr().out.splitlines()
    if json_too:
        found = {line["id"]: (line["reason"], line["keys"]) for line in map(json.loads, lines)}
        assert found == {text_id("bad"): ("too long", ["kb"]), text_id("worse"): ("no vector", [])}
    else:
        assert f"{text_id('bad')} (kb): too long" in lines
        assert f"{text_id('worse')}: no vector" in lines
        assert lines[-1] == "2 texts failed"


async def test_rebuild_makes_the_same_index_again_and_leaves_damaged_files_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path)
    index, ledger = tmp_path / "embeddings_index.json", tmp_path / "ledger.sqlite"
    before = index.read_bytes()
    for damage in (lambda: None, index.unlink, ledger.unlink, lambda: _half(ledger)):
        damage()
        assert run(["rebuild", str(tmp_path)]) == 0
        assert index.read_bytes() == before
        assert run(["verify", str(tmp_path)]) == 0
    _half(file_of(tmp_path, "text 3"))
    capsys.readouterr()
    assert run(["rebuild", str(tmp_path)]) == 1
    assert "left out" in capsys.readouterr().out
    assert text_id("text 3") not in texts_of(tmp_path)
    async with opened(tmp_path) as store:
        assert store.n_done == 4


async def test_rebuild_of_a_folder_that_lost_what_it_was_made_with_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path)
    forget(tmp_path)
    assert run(["rebuild", str(tmp_path)]) == 3
    assert "run a job with the options that made them" in capsys.readouterr().err
    async with opened(tmp_path) as store:
        assert (store.n_done, store.fingerprint) == (5, FINGERPRINT)


@pytest.mark.parametrize("command", [["rebuild"], ["verify", "--remove-damaged"]])
def test_writing_commands_are_refused_while_a_job_writes_and_reading_ones_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    asyncio.run(fill(tmp_path))
    lock = FolderLock(StorePaths.of(tmp_path))
    lock.acquire()
    try:
        assert run([*command, str(tmp_path)]) == 3
        assert "is writing to it" in capsys.readouterr().err
        assert run(["verify", str(tmp_path)]) == 0
        assert run(["failures", str(tmp_path)]) == 0
    finally:
        lock.release()
    assert run([*command, str(tmp_path)]) == 0  # and the refusal left no lock behind


def test_folder_that_is_none_exits_3_and_bad_usage_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "failures", "rebuild"):
        assert run([command, str(tmp_path / "none")]) == 3
        assert "there is no such folder" in capsys.readouterr().err
        assert run([command, str(tmp_path)]) == 3
        assert "holds no embeddings" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("text")
    for command in ("verify", "failures", "rebuild"):
        assert run([command, str(tmp_path / "file")]) == 3
        assert "is a file, not a folder of embeddings" in capsys.readouterr().err
    assert run(["polish"]) == 2
    assert run(["verify"]) == 2


async def test_program_imports_nothing_that_knows_a_model(tmp_path: Path) -> None:
    await fill(tmp_path)
    script = (
        "import sys\nfrom asyncembed.cli.store import run\n"
        "for command in ('verify', 'failures', 'rebuild'):\n    assert run([command, sys.argv[1]]) == 0\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'sentence_transformers', 'openvino'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    helped = subprocess.run(
        [sys.executable, "-m", "asyncembed.cli.store", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(command in helped.stdout for command in ("verify", "failures", "rebuild"))
    assert len(open_embeddings(tmp_path)) == 5


def test_error_names_the_program_that_was_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["failures", str(tmp_path / "nowhere")]) in (2, 3)
    assert capsys.readouterr().err.startswith("asyncembed-store: error: ")
