"""One writer a folder, across processes and within one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed.errors import StoreLockedError, StoreMismatchError
from asyncembed.sinks import JsonStore

from .making import FINGERPRINT, MADE_WITH, opened, record

_HOLDER = """
import asyncio, sys
from asyncembed.sinks import JsonStore

async def main():
    store = JsonStore(sys.argv[1])
    await store.open()
    print("held", flush=True)
    sys.stdin.read()
    await store.aclose()

asyncio.run(main())
"""


def _hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


async def test_open_folder_of_another_process_is_refused_with_its_pid_until_it_ends(tmp_path: Path) -> None:
    with _hold(tmp_path) as holder:
        store = JsonStore(tmp_path)
        with pytest.raises(StoreLockedError) as refused:
            await store.open()
        assert str(tmp_path) in str(refused.value)
        assert f"pid {holder.pid} on host {socket.gethostname()}" in str(refused.value)
        holder.communicate("")
        assert holder.returncode == 0
    async with opened(tmp_path) as store:
        assert store.n_done == 0


async def test_open_folder_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with _hold(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / ".lock.owner").exists()
    async with opened(tmp_path):
        assert json.loads((tmp_path / ".lock.owner").read_bytes())["pid"] == os.getpid()
    assert not (tmp_path / ".lock.owner").exists()


async def test_open_two_stores_in_one_process_the_second_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
        for overwrite in (False, True):
            with pytest.raises(StoreLockedError, match=f"pid {os.getpid()} "):
                await JsonStore(tmp_path, overwrite=overwrite).open()
        await store.commit([record("two")])  # the refused ones took nothing away
    async with opened(tmp_path) as store:
        assert store.n_done == 2


async def test_open_refused_for_another_reason_frees_the_lock(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one")])
    with pytest.raises(StoreMismatchError):
        async with opened(tmp_path, {"weights": "other"}):
            pass
    async with opened(tmp_path):
        pass


async def test_open_two_constructed_stores_hold_nothing(tmp_path: Path) -> None:
    first, second = JsonStore(tmp_path), JsonStore(tmp_path)
    await first.open()
    await first.claim(FINGERPRINT, MADE_WITH)
    await first.aclose()
    await second.open()
    await second.aclose()


async def test_open_damaged_owner_file_still_refuses(tmp_path: Path) -> None:
    async with opened(tmp_path):
        (tmp_path / ".lock.owner").write_bytes(b"\0")
        with pytest.raises(StoreLockedError, match="another job is writing"):
            await JsonStore(tmp_path).open()
