"""The ledger: rows like a dict, read while it is written, and refused or made anew when it is not what it should be."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.cli.store import run
from asyncembed.errors import StoreError
from asyncembed.records import text_id
from asyncembed.store import Store, open_embeddings
from asyncembed.store.ledger import DONE, FAILED, KEY, REMOVED, Header, Ledger, Row
from tests.conftest import ROOT

from .making import FINGERPRINT, MADE_WITH, failure, ids, killed_after, opened, record

_numbers = st.integers(0, 9)
_keys = st.none() | st.text(st.characters(codec=None, exclude_categories=()), max_size=3)
_rows = st.builds(
    lambda kind, number, key, error: Row(
        kind,
        text_id(str(number)),
        key if kind != REMOVED else None,
        number,
        1,
        100 if kind == DONE else None,
        error if kind == FAILED else None,
    ),
    st.sampled_from([DONE, FAILED, REMOVED]),
    _numbers,
    _keys,
    st.text(st.characters(codec=None, exclude_categories=()), max_size=3),
) | st.builds(lambda number, key: Row(KEY, text_id(str(number)), key), _numbers, st.text(max_size=2))


@given(rounds=st.lists(st.lists(_rows, max_size=12), max_size=4))
def test_ledger_any_rows_the_last_word_counts(rounds: list[list[Row]]) -> None:
    texts: dict[str, Row] = {}
    keys: dict[str, str] = {}
    with closing(Ledger.temporary()) as ledger:
        for rows in rounds:
            ledger.append(rows)
            for row in rows:
                if row.kind != KEY:
                    texts[row.id] = row
                if row.key is not None:
                    keys.pop(row.key, None)
                    keys[row.key] = row.id
            assert list(ledger.texts()) == [texts[identity] for identity in sorted(texts)]
            assert list(ledger.done()) == sorted(row.id for row in texts.values() if row.kind == DONE)
            assert dict(ledger.owners()) == keys
            assert ledger.is_empty() == (not texts and not keys)


def test_ledger_knows_which_files_to_look_at_after_a_run_that_was_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.sqlite")
    one, two, three = ids("one", "two", "three")
    with closing(Ledger.write(path)) as ledger:
        ledger.append([Row(DONE, one, size=1)])
        ledger.end(1)
        assert (ledger.is_clean(), ledger.n_done()) == (True, 1)
    with closing(Ledger.write(path)) as ledger:
        ledger.append([Row(DONE, two, size=2), Row(DONE, three, size=3), Row(DONE, two, size=4)])
    with closing(Ledger.write(path)) as ledger:
        assert not ledger.is_clean()
        assert dict(ledger.unchecked()) == {two: 4, three: 3}
        ledger.end(3)
        assert ledger.is_clean()
        assert dict(ledger.unchecked()) == {}


def test_ledger_of_a_newer_version_is_refused_by_whoever_reads_or_writes(tmp_path: Path) -> None:
    asyncio.run(killed_after(tmp_path, [record("one")]))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as newer:
        newer.execute("pragma user_version = 7")
    with pytest.raises(StoreError, match=r"written in version 7 .*update asyncembed"):
        open_embeddings(tmp_path)
    with pytest.raises(StoreError, match=r"written in version 7 .*update asyncembed"):
        asyncio.run(Store(tmp_path).open())


@pytest.mark.parametrize("make", [lambda path: _database(path), lambda path: path.write_bytes(b"a list\n" * 99)])
def test_file_of_another_program_under_the_ledgers_name_is_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "ledger.sqlite")
    before = (tmp_path / "ledger.sqlite").read_bytes()
    with pytest.raises(StoreError, match=r"ledger\.sqlite: this file is not asyncembed's"):
        asyncio.run(Store(tmp_path).open())
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


def _database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("create table log(note text)")


def test_ledger_damaged_where_only_a_whole_look_finds_it_is_read_from_the_index_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fill() -> None:
        async with opened(tmp_path) as store:
            await store.commit([record("one", "a"), *(failure(f"bad {n}", "why " * 9, f"k{n}") for n in range(3000))])

    asyncio.run(fill())
    ledger = tmp_path / "ledger.sqlite"
    data = ledger.read_bytes()
    ledger.write_bytes(data[: len(data) // 2] + b"\xa5" * (len(data) - len(data) // 2))
    stored = open_embeddings(tmp_path)
    assert stored.by_key("a").text == "one"
    assert len(stored.failures()) == 3000
    assert run(["failures", str(tmp_path)]) == 1  # the index may lack some
    assert run(["verify", str(tmp_path)]) == 1
    assert "ledger.sqlite: is damaged" in capsys.readouterr().out
    assert run(["rebuild", str(tmp_path)]) == 0
    assert run(["verify", str(tmp_path)]) == 0
    assert len(open_embeddings(tmp_path).failures()) == 3000


@pytest.mark.parametrize(
    "damage",
    ["id = 'no id'", "id = x'00'", "kind = 'odd'", "size = x'00'", "error = x'00'", "key = cast(x'e5' as text)"],
)
def test_rows_that_nobody_wrote_are_damage(tmp_path: Path, damage: str) -> None:
    async def fill() -> None:
        async with opened(tmp_path) as store:
            await store.commit([record("one", "a"), failure("bad", "too long", "b")])

    asyncio.run(fill())
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as ledger:
        ledger.execute(f"update log set {damage}")
    stored = open_embeddings(tmp_path)
    assert stored.by_key("a").text == "one"
    assert list(stored.failures().values()) == ["too long"]
    assert run(["rebuild", str(tmp_path)]) == 0
    assert run(["verify", str(tmp_path)]) == 0


_WRITER = """
import asyncio, sys
from tests.store.making import FINGERPRINT, MADE_WITH, failure, record
from asyncembed.store import Store

async def main():
    store = Store(sys.argv[1])
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    for n in range(3):
        await store.commit([record(f"text {n}", f"k{n}"), failure(f"bad {n}", "too long")])
        print(n, flush=True)
        sys.stdin.readline()
    await store.aclose()

asyncio.run(main())
"""


def test_readers_in_another_process_see_what_a_running_job_has_saved(tmp_path: Path) -> None:
    """Also one that began before, and the program that looks after folders."""
    store = [sys.executable, "-m", "asyncembed.cli.store"]
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        stored = None
        for n in range(3):
            assert job.stdout.readline() == f"{n}\n"
            stored = stored or open_embeddings(tmp_path)
            assert stored.by_key(f"k{n}").text == f"text {n}"
            assert stored.failures() == dict.fromkeys(ids(*(f"bad {m}" for m in range(n + 1))), "too long")
            for command, words in (("verify", f"{n + 1} file"), ("failures", f"{n + 1} text")):
                done = subprocess.run(
                    [*store, command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
                )
                assert (done.returncode, done.stdout.splitlines()[-1].startswith(words)) == (0, True), done
            job.stdin.write("\n")
            job.stdin.flush()
        assert job.wait() == 0
    assert not (tmp_path / "ledger.sqlite-wal").exists()
    assert stored.by_key("k2").text == "text 2"


_READER = """
import os, sys
from asyncembed.store.reader import open_embeddings  # which that user could not read
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
stored = open_embeddings(sys.argv[1])
print(len(stored), stored.by_key("a").text, list(stored.failures().values()), stored.fingerprint["weights"])
"""


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("killed", [False, True])
def test_read_only_folder_is_read_by_another_user(killed: bool) -> None:
    folder = Path("/tmp") / f"asyncembed-{os.getpid()}"  # that user may not enter the test's own folder
    try:
        asyncio.run(_two_runs(folder, killed))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted(path.name for path in folder.rglob("*"))
        done = subprocess.run(
            [sys.executable, "-c", _READER, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.stdout == "2 one ['too long'] abc\n", done.stderr
        assert sorted(path.name for path in folder.rglob("*")) == before
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _two_runs(folder: Path, killed: bool) -> None:
    async with opened(folder) as store:
        await store.commit([record("one", "a"), failure("bad", "too long")])
    if killed:
        await killed_after(folder, [record("two")])
    else:
        async with opened(folder) as store:
            await store.commit([record("two")])


def test_header_of_a_folder_survives_the_ledger(tmp_path: Path) -> None:
    header = Header.of({**FINGERPRINT, "odd": ("é", "\ud800", 1 << 70)}, MADE_WITH)
    path = str(tmp_path / "ledger.sqlite")
    with closing(Ledger.write(path)) as ledger:
        ledger.set_header(header)
    reading = Ledger.read(path)
    assert reading is not None
    with closing(reading):
        assert reading.header() == header
        assert header.digest() == reading.header().digest()
