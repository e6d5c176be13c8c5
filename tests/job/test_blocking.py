"""The guard that fails a test when the package blocks the event loop does see it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockingError

from asyncembed import embed_stream
from asyncembed.store.files import write_whole
from asyncembed.store.lock import FolderLock, StorePaths
from tests.fakes import FakeEncoder


async def test_file_written_on_the_loop_is_seen(tmp_path: Path) -> None:
    with pytest.raises(BlockingError):
        write_whole(str(tmp_path / "file"), b"data")


async def test_lock_taken_on_the_loop_is_seen(tmp_path: Path) -> None:
    lock = FolderLock(StorePaths.of(tmp_path))
    with pytest.raises(BlockingError):
        lock.acquire()
    lock.release()


def test_file_written_in_a_thread_is_left_alone(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "file"), b"data")
    thread = threading.Thread(target=write_whole, args=arguments)
    thread.start()
    thread.join()
    assert (tmp_path / "file").read_bytes() == b"data"


async def test_whole_job_asks_the_model_for_nothing_on_the_loop(tmp_path: Path) -> None:
    """Versions are looked up on disk: that was once done on the loop."""
    asked: dict[str, set[int]] = {}

    class Watched(FakeEncoder):
        def made_with(self) -> Mapping[str, Any]:
            asked.setdefault("made_with", set()).add(threading.get_ident())
            return super().made_with()

        def fingerprint(self) -> Mapping[str, Any]:
            asked.setdefault("fingerprint", set()).add(threading.get_ident())
            return super().fingerprint()

    encoder = Watched()
    await embed_stream([f"text {n}" for n in range(300)], model=encoder, save_path=tmp_path).run()
    assert asked["made_with"] == asked["fingerprint"] == encoder.threads
    assert threading.get_ident() not in encoder.threads
