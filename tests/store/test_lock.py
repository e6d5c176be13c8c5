"""One writer a folder, across processes and within one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import asyncembed.generator
from asyncembed import EmbeddingGenerator
from asyncembed.errors import StoreLockedError, StoreMismatchError
from asyncembed.records import text_id
from asyncembed.store import Store, check, open_embeddings
from asyncembed.store.files import StorePaths
from tests.conftest import ROOT
from tests.fakes import FakeEncoder

from .making import FINGERPRINT, MADE_WITH, opened, record

_HOLDER = """
import asyncio, sys
from asyncembed.store import Store

async def main():
    store = Store(sys.argv[1])
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
        store = Store(tmp_path)
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
                await Store(tmp_path, overwrite=overwrite).open()
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
    first, second = Store(tmp_path), Store(tmp_path)
    await first.open()
    await first.claim(FINGERPRINT, MADE_WITH)
    await first.aclose()
    await second.open()
    await second.aclose()


async def test_open_damaged_owner_file_still_refuses(tmp_path: Path) -> None:
    async with opened(tmp_path):
        (tmp_path / ".lock.owner").write_bytes(b"\0")
        with pytest.raises(StoreLockedError, match="another job is writing"):
            await Store(tmp_path).open()


async def test_open_owner_of_a_reused_pid_that_holds_nothing_never_blocks(tmp_path: Path) -> None:
    tmp_path.joinpath(".lock").write_bytes(b"")
    for pid in (os.getpid(), os.getppid(), 1):  # all of them live, none of them writes
        owner = {"pid": pid, "host": socket.gethostname(), "started": "2020-01-01T00:00:00+00:00"}
        (tmp_path / ".lock.owner").write_text(json.dumps(owner))
        async with opened(tmp_path):
            pass


async def test_open_folder_of_another_container_is_refused_until_its_process_is_killed(tmp_path: Path) -> None:
    """Another pid namespace, as a container has: its pids mean nothing here, the kernel's lock does."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no right to make a pid namespace here")
    command = [*unshare, sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreLockedError, match=r"pid 1 on host"):
            await Store(tmp_path).open()
        holder.kill()
        holder.stdout.read()  # ends when the last process of the namespace has
    async with opened(tmp_path) as store:
        assert store.n_done == 0


def test_generator_on_a_locked_folder_is_refused_before_its_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=tmp_path)
    with _hold(tmp_path) as holder:
        with monkeypatch.context() as patch:
            patch.setattr(asyncembed.generator, "encoder_for", lambda *_: pytest.fail("the model was loaded"))
            with pytest.raises(StoreLockedError, match=rf"pid {holder.pid} on host"):
                generator(iter(["one", "two"]))
        holder.communicate("")
    assert len(generator(iter(["one", "two"]))) == 2
    assert len(open_embeddings(tmp_path)) == 2


def test_rebuild_beside_another_is_refused_and_leaves_it_its_files(tmp_path: Path) -> None:
    async def fill() -> None:
        async with opened(tmp_path) as store:
            await store.commit([record("one", "k1"), record("two", "k2")])

    asyncio.run(fill())
    (tmp_path / "embeddings_data" / f"{text_id('one')}.json").write_text("{")
    under_way = check.rebuild(StorePaths.of(tmp_path))
    assert next(under_way).removable
    with pytest.raises(StoreLockedError):
        list(check.rebuild(StorePaths.of(tmp_path)))
    assert list(under_way) == []
    assert open_embeddings(tmp_path).by_key("k2").text == "two"


def test_program_on_a_locked_folder_ends_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    script = (
        "import sys\nfrom asyncembed.cli import main\nsys.argv = ['asyncembed', 'a.txt']\ncode = main()\n"
        "sys.stdout.write(' '.join(sys.modules))\nsys.exit(code)"
    )
    with _hold(tmp_path / "data") as holder:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        holder.communicate("")
    assert done.returncode == 3
    assert f"pid {holder.pid} on host {socket.gethostname()}" in done.stderr
    heavy = {"torch", "openvino", "transformers", "sentence_transformers", "tokenizers"}
    assert not heavy & set(done.stdout.split())
