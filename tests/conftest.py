"""Fixtures that many tests share. The model is loaded once; engines are opened inside the tests."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import platformdirs
import pytest
from blockbuster import BlockBuster

from asyncembed import EmbedOptions, load_encoder

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "examples" / "notes.csv"


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, also for the processes they start: what a test learns is not the user's.

    All else that lies in the user's cache, such as graphs, is there as a link: making it anew takes long.
    """
    own = tmp_path_factory.mktemp("cache")
    theirs = Path(platformdirs.user_cache_dir())
    ours = Path(platformdirs.user_cache_dir("asyncembed"))
    (own / "asyncembed").mkdir()
    for name in ("graphs", "weights"):
        (ours / name).mkdir(parents=True, exist_ok=True)
        (own / "asyncembed" / name).symlink_to(ours / name)
    for path in theirs.iterdir():
        if path != ours:
            (own / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield own


@pytest.fixture(autouse=True)
def nothing_learnt(cache_folder: Path) -> None:
    """Every test begins on a machine that has learnt nothing of any model's batches."""
    shutil.rmtree(cache_folder / "asyncembed" / "limits", ignore_errors=True)


@pytest.fixture(scope="session")
def encoder() -> Any:
    """The real model, all-MiniLM-L6-v2 in float32 on the CPU, run by torch."""
    return load_encoder(EmbedOptions(device="cpu", backend="torch"))


@pytest.fixture(scope="session")
def model(encoder: Any) -> Any:
    """The same as a live `SentenceTransformer`."""
    return encoder.model


class _EveryFunction(frozenset[str]):
    def __contains__(self, name: object) -> bool:
        return True


MAY_BLOCK = {
    # Joins a thread that has told it has nothing left to do: microseconds. `close` is for synchronous code.
    "asyncembed/threads.py": {"aclose", "close"},
    "asyncembed/sources/feed.py": {"_stop"},  # the same, or held for an append
    # For synchronous code: it is the test that calls them on a loop.
    "asyncembed/langchain.py": {"_wait", "close"},
    "asyncembed/cli/store.py": _EveryFunction(),
    "asyncembed/store/files.py": {"of"},  # the working directory: no disk is asked
    "asyncembed/engine/memory.py": _EveryFunction(),  # files of the kernel, answered from memory
    "asyncembed/records.py": _EveryFunction(),  # the same: when the process began, and its peak of memory
    "asyncembed/store/reader.py": _EveryFunction(),  # for synchronous code: a test calls it on a loop
    "asyncembed/generator.py": _EveryFunction(),  # synchronous too, in a notebook above a running loop
    "asyncembed/steps.py": _EveryFunction(),  # the same
    "logging/__init__.py": {"emit"},  # where a warning goes is the user's choice
}
"""Where a call may block the loop, each with its reason: functions by the file they are in."""


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> Iterator[None]:
    """A call of the package that blocks an event loop (a file, a lock, a sleep, a socket) fails the test."""
    guard = BlockBuster("asyncembed")
    for function in guard.functions.values():
        for file, names in MAY_BLOCK.items():
            function.can_block_in(file, names)
    guard.activate()
    try:
        yield
    finally:
        guard.deactivate()


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """No thread of ours outlives the test."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncembed")] == []


async def all_tasks_done() -> None:
    """Wait until no other task runs on this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        with anyio.fail_after(30):
            await asyncio.wait(others)
