"""What a saved text outlives: flushed in the right order, and found again after the power was cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncembed import open_embeddings
from asyncembed.errors import StoreError
from asyncembed.records import text_id
from asyncembed.store import Store
from tests.conftest import ROOT

from .making import FINGERPRINT, MADE_WITH, record

Event = tuple[str, str]


class Calls:
    """The real calls that change the disk, noted while they run."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._root = root
        for name in ("fsync", "replace", "unlink", "write"):
            patch.setattr(os, name, self._noted(name, getattr(os, name)))

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            result = call(*arguments)
            what = arguments[1] if name == "replace" else arguments[0]
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what
            if Path(path).is_relative_to(self._root):
                self.events.append((name, str(Path(path).relative_to(self._root))))
            return result

        return noted

    def taken(self) -> list[Event]:
        """The events since the last time."""
        events, self.events = self.events, []
        return events


def in_order(events: list[Event], *wanted: Event) -> bool:
    """Whether the wanted events are among the others in this order."""
    rest = iter(events)
    return all(one in rest for one in wanted)


async def _power(path: Path) -> Store:
    store = Store(path, durability="power")
    await store.open()
    return store


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")


@needs_proc
async def test_commit_power_flushes_all_then_renames_all_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {n}" for n in range(70)]  # more than are held open at once
    store = await _power(tmp_path)
    await store.claim(FINGERPRINT, MADE_WITH)
    calls = Calls(tmp_path, monkeypatch)
    await store.commit([record(text) for text in texts])
    events = calls.taken()
    temporary = [("fsync", f"embeddings_data/.{text_id(text)}.tmp") for text in texts]
    places = [("replace", f"embeddings_data/{text_id(text)}.json") for text in texts]
    last_flush = max(events.index(event) for event in temporary)
    first_place = min(events.index(event) for event in places)
    assert last_flush < first_place
    assert events.count(("fsync", "embeddings_data")) == 1  # once for all of them
    last_place = max(events.index(event) for event in places)
    assert events[last_place + 1 :] == [("fsync", "embeddings_data")]  # the ledger flushes by itself
    await store.aclose()


@needs_proc
async def test_close_power_flushes_the_new_index_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await _power(tmp_path)
    await store.claim(FINGERPRINT, MADE_WITH)
    await store.commit([record("one")])
    calls = Calls(tmp_path, monkeypatch)
    await store.aclose()
    assert in_order(
        calls.taken(),
        ("fsync", ".embeddings_index.json.tmp"),
        ("replace", "embeddings_index.json"),
        ("fsync", "."),
    )


@needs_proc
async def test_commit_process_flushes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    calls = Calls(tmp_path, monkeypatch)
    await store.commit([record("one"), record("two")])
    assert [name for name, _ in calls.taken() if name == "fsync"] == []
    await store.aclose()


@needs_proc
async def test_open_power_flushes_the_names_of_new_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tmp_path, monkeypatch)
    store = await _power(tmp_path / "a" / "b")
    assert [what for name, what in calls.taken() if name == "fsync"] == ["a/b", "a", "."]
    await store.aclose()


async def test_commit_power_a_file_that_cannot_be_placed_leaves_no_half_and_the_rest_can_be_gone_on_with(
    tmp_path: Path,
) -> None:
    store = await _power(tmp_path)
    await store.claim(FINGERPRINT, MADE_WITH)
    in_the_way = tmp_path / "embeddings_data" / f"{text_id('two')}.json"
    (in_the_way / "mine").mkdir(parents=True)
    with pytest.raises(StoreError, match="move that folder away"):
        await store.commit([record("one"), record("two"), record("three")])
    await store.aclose()
    assert not list(tmp_path.rglob("*.tmp"))
    in_the_way.rename(tmp_path / "away")
    store = await _power(tmp_path)
    await store.claim(FINGERPRINT, MADE_WITH)
    texts = ["one", "two", "three"]
    done = [found.is_done for found in await store.find(texts)]
    await store.commit([record(text) for text, there in zip(texts, done, strict=True) if not there])
    await store.aclose()
    assert {stored.text for stored in open_embeddings(tmp_path)} == set(texts)


_CUT = r"""
import asyncio, os, shutil, subprocess, sys
from asyncembed.store import Store
from tests.store.making import FINGERPRINT, MADE_WITH, record

image, mounted, durability = sys.argv[1:]

async def main():
    store = Store(mounted + "/made/data", durability=durability)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    for batch in range(3):
        await store.commit([record(f"{batch} {n}", dim=384) for n in range(20)])
        shutil.copyfile(image, f"{image}.{batch}")  # what has reached the disk: the rest is in memory only
    await store.aclose()
    shutil.copyfile(image, f"{image}.closed")

asyncio.run(main())
"""

_FOUND = """
import asyncio, sys
from asyncembed.store import Store, open_embeddings

async def main(path):
    store = Store(path)
    await store.open()
    n_done, known = store.n_done, store.fingerprint is not None
    await store.aclose(complete=False)
    print(n_done, sum(1 for _ in open_embeddings(path)), known)

asyncio.run(main(sys.argv[1]))
"""

_IN_A_NAMESPACE = ["unshare", "-m", "sh", "-ec"]
_WITH_DISK = 'mount -o loop "$1" "$2"; "$3" -c "$4" "$1" "$2" "$5" || code=$?; umount "$2"; exit ${code:-0}'
_LOOK = 'mount -o loop "$1" "$2"; "$3" -c "$4" "$2/made/data" || code=$?; umount "$2"; exit ${code:-0}'


def _in_namespace(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*_IN_A_NAMESPACE, script, "sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _new_disk(tmp_path: Path) -> Path:
    image, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    make = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if make is None or shutil.which("unshare") is None:
        pytest.skip("no tools to make a file system with")
    subprocess.run([make, "-q", "-F", str(image)], check=True)
    if _in_namespace('mount -o loop "$1" "$2" && umount "$2"', image, mounted).returncode:
        pytest.skip("no right to mount a file system here")
    return image


def test_power_cut_right_after_a_commit_loses_no_text_that_was_saved(tmp_path: Path) -> None:
    """A copy of the disk under the file system holds what was flushed and nothing else, as after a power cut."""
    image = _new_disk(tmp_path)
    mounted = tmp_path / "mounted"
    done = _in_namespace(_WITH_DISK, image, mounted, sys.executable, _CUT, "power")
    assert done.returncode == 0, done.stderr
    for cut, n_texts in (("0", 20), ("2", 60), ("closed", 60)):
        found = _in_namespace(_LOOK, f"{image}.{cut}", mounted, sys.executable, _FOUND)
        assert found.stdout.split() == [str(n_texts), str(n_texts), "True"], found.stderr


def test_power_cut_without_flushing_tears_nothing_that_is_believed(tmp_path: Path) -> None:
    """The default promises nothing here but honesty: what it counts as done can be read."""
    image = _new_disk(tmp_path)
    mounted = tmp_path / "mounted"
    done = _in_namespace(_WITH_DISK, image, mounted, sys.executable, _CUT, "process")
    assert done.returncode == 0, done.stderr
    found = _in_namespace(_LOOK, f"{image}.2", mounted, sys.executable, _FOUND)
    assert found.returncode == 0, found.stderr
    n_done, n_read, _ = found.stdout.split()
    assert n_done == n_read
    assert int(n_done) < 60
