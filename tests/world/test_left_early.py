"""Jobs that are left by `break`, and cursors that belong to one thread."""

from __future__ import annotations

import gc
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from asyncembed import EmbeddingGenerator, StoreLockedError, embed_stream, open_embeddings
from tests.conftest import all_tasks_done
from tests.fakes import FakeEncoder

pytestmark = pytest.mark.usefixtures("no_leftovers")


def many() -> Iterator[str]:
    return (f"text {number}" for number in range(2000))


async def test_next_job_on_a_folder_waits_for_one_that_was_left_by_break(tmp_path: Path) -> None:
    for _ in range(3):
        async for record in embed_stream(many(), model=FakeEncoder(), save_path=tmp_path):
            assert record.error is None
            break
    assert len(await embed_stream(["one", "two"], model=FakeEncoder(), save_path=tmp_path)) == 2
    await all_tasks_done()
    assert open_embeddings(tmp_path)["one"].text == "one"


async def test_next_job_on_a_folder_with_an_open_one_is_told_of_async_with(tmp_path: Path) -> None:
    first = embed_stream(many(), model=FakeEncoder(), save_path=tmp_path)
    async with first:
        records = aiter(first)
        await anext(records)
        for _ in range(2):
            with pytest.raises(StoreLockedError, match=r"another job of this process that is still open: `async with"):
                await embed_stream(["one"], model=FakeEncoder(), save_path=tmp_path)
    assert len(await embed_stream(["one"], model=FakeEncoder(), save_path=tmp_path)) == 1


async def test_break_on_a_loop_that_closes_no_iterators_prints_nothing_and_closes_the_job(tmp_path: Path) -> None:
    """As nest_asyncio's: what a finalizer raises would be printed, and is an error here."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        async for _ in embed_stream(many(), model=FakeEncoder(), save_path=tmp_path):
            break
        gc.collect()
        assert len(await embed_stream(["one"], model=FakeEncoder(), save_path=tmp_path)) == 1
    finally:
        sys.set_asyncgen_hooks(*hooks)
    await all_tasks_done()
    for thread in threading.enumerate():  # nobody was left to wait for the source's thread; it ends by itself
        if thread.name == "asyncembed-source":
            thread.join(30)


def rows(database: sqlite3.Connection) -> Any:
    database.execute("create table notes (text)")
    database.executemany("insert into notes values (?)", [("a heron",), ("a boat",)])
    return database.execute("select text from notes")


async def test_sqlite_cursor_is_refused_with_the_cure() -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        cursor = rows(database)
        texts = (text for (text,) in cursor)
        with pytest.raises(sqlite3.ProgrammingError, match="check_same_thread=False") as caught:
            await embed_stream(texts, model=FakeEncoder(), save_path=None)
        assert "SQLite objects created in a thread" in str(caught.value)


async def test_sqlite_cursor_that_may_be_used_in_any_thread_is_embedded() -> None:
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as database:
        texts = (text for (text,) in rows(database))
        assert len(await embed_stream(texts, model=FakeEncoder(), save_path=None)) == 2


def test_generator_takes_a_sqlite_cursor_in_the_calling_thread() -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        found = EmbeddingGenerator(FakeEncoder(), save_path=None)(text for (text,) in rows(database))
    assert list(found) == ["a heron", "a boat"]
