"""Disks that fill, folders that vanish, processes that are killed: nothing is torn, and the message says what to do."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed.errors import StoreError
from asyncembed.store import Store, open_embeddings

from .making import FINGERPRINT, MADE_WITH, opened, record

_WRITER = """
import asyncio, os, sys
import numpy as np
from asyncembed.errors import StoreError
from asyncembed.records import EmbeddedChunk, EmbeddedText, text_id
from asyncembed.store import Store, open_embeddings

async def main(path, n_batches, dim):
    store = Store(path)
    await store.open()
    await store.claim({"weights": "abc", "dim": dim, "prompt": None}, {})
    print("ready", store.n_done, flush=True)
    try:
        for batch in range(store.n_done // 16, n_batches):
            records = []
            for n in range(16):
                text, vector = f"{batch} {n}", np.full(dim, batch / 7, np.float32)
                records.append(EmbeddedText(text_id(text), n, None, text, vector, (EmbeddedChunk(text, 0, 1, vector),)))
            await store.commit(records)
            print(batch, flush=True)
    except StoreError as error:
        print("StoreError", error, flush=True)
        if "--large" in sys.argv:
            for stored in open_embeddings(path):
                assert len(stored.embedding) == dim
            left = [name for name in os.listdir(path + "/embeddings_data") if not name.endswith(".json")]
            print("whole", left, flush=True)
    finally:
        await store.aclose()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


def _run_and_kill(folder: Path, n_lines: int) -> None:
    """Kill a job right after it has said that so many batches are committed."""
    command = [sys.executable, "-c", _WRITER, str(folder), str(10**6), "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().startswith("ready")
        said = [writer.stdout.readline() for _ in range(n_lines)]
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.read().splitlines(keepends=True)
    batches = [int(line) for line in said if line.endswith("\n")]
    for batch in batches:  # what was said to be saved is there
        assert all(f"{batch} {n}" in open_embeddings(folder) for n in range(16))


async def test_commit_killed_at_any_instant_tears_nothing_and_loses_nothing(tmp_path: Path) -> None:
    for round_ in range(6):
        _run_and_kill(tmp_path, 3 + 11 * round_)
        files = list((tmp_path / "embeddings_data").glob("*.json"))
        for path in files:
            json.loads(path.read_bytes())
        store = Store(tmp_path)
        await store.open()
        assert store.n_done == len(files)
        await store.aclose(complete=False)
    assert len(list(open_embeddings(tmp_path))) == len(files)


def _run_limited(folder: Path, max_bytes: int, *arguments: str) -> str:
    """What a job says whose files, the ledger among them, may not grow beyond a size."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))

    command = [sys.executable, "-c", _WRITER, str(folder), "1000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commit_disk_full_names_path_reason_and_remedy(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    script = 'mount -t tmpfs -o size=512k tmpfs "$1" && exec "$2" -c "$3" "$1" 1000 384 --large'
    command = [unshare, "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, _WRITER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error, whole = done.stdout.splitlines()[-2:]
    assert error.startswith(f"StoreError {tmp_path}")
    assert "No space left on device; free some space and run the same command again" in error
    assert whole == "whole []"


def test_commit_file_size_limit_names_path_reason_and_remedy(tmp_path: Path) -> None:
    error, whole = _run_limited(tmp_path, 200_000, "40000", "--large").splitlines()[-2:]
    assert error.startswith(f"StoreError {tmp_path}")
    assert "File too large" in error
    assert "run the same command again" in error
    assert whole == "whole []"


async def test_commit_ledger_that_may_not_grow_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    out = _run_limited(tmp_path, 60_000, "4")  # files fit, the ledger soon does not
    assert f"StoreError {tmp_path}/ledger.sqlite: " in out
    assert "run the same command again" in out
    n_files = len(list((tmp_path / "embeddings_data").glob("*.json")))
    async with opened(tmp_path) as store:
        assert store.n_done == n_files > 0
    assert json.loads((tmp_path / "embeddings_index.json").read_bytes())["n_completed"] == n_files


async def test_commit_folder_replaced_by_a_file_is_a_store_error_and_releases(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = Store(folder)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    await store.commit([record("one")])
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match=r"moved or removed"):
        await store.commit([record("two")])
    folder.write_text("a file")
    with pytest.raises(StoreError, match=r"has to be a folder"):
        await store.commit([record("three")])
    await store.aclose()
    folder.unlink()
    async with opened(folder) as again:
        assert again.n_done == 0
