"""The store as the event loop sees it: one hop to its own thread for each call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import aiofiles.os
import anyio

from asyncembed.errors import ClosedError, CorruptRecordError
from asyncembed.options import Durability
from asyncembed.records import EmbeddedText, Rejected, text_id
from asyncembed.store.files import StorePaths
from asyncembed.store.format import StoredText
from asyncembed.store.writer import FolderWriter
from asyncembed.threads import WorkerThread

P = ParamSpec("P")
T = TypeVar("T")


class Found(NamedTuple):
    """What a store knows of a text: its id, and whether an earlier run or this one has saved it."""

    id: str
    is_done: bool = False
    is_written: bool = False


class Store:
    """A folder of embeddings as the event loop sees it.

    `open` takes the folder's lock, `claim` says what the vectors are made with, `commit` saves micro-batches, and
    `aclose` completes the ledger and gives the lock back. Constructing one touches nothing. Everything that blocks runs
    in the store's own thread, one call at a time; cancelling a call stops the waiting, and a call that had begun runs
    to its end.
    """

    def __init__(
        self, save_path: str | os.PathLike[str], *, overwrite: bool = False, durability: Durability = "process"
    ) -> None:
        self._writer = FolderWriter(StorePaths.of(save_path), overwrite=overwrite, durable=durability == "power")
        self._worker = WorkerThread("asyncembed-store")
        self._state = "new"

    def __repr__(self) -> str:
        return f"<Store {self._writer.paths.root!r} {self._state} n_done={self.n_done}>"

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return Path(self._writer.paths.root)

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What the folder's vectors depend on; None for a new folder, or one that lost it, until `claim`."""
        return None if self._writer.header is None else dict(self._writer.header.fingerprint)

    @property
    def made_with(self) -> dict[str, Any] | None:
        """Backend, versions and model of the job that began the folder; None as for `fingerprint`."""
        return None if self._writer.header is None else dict(self._writer.header.made_with)

    @property
    def n_done(self) -> int:
        """Texts that earlier runs have saved."""
        return len(self._writer.done)

    async def open(self, *, scan: bool = True) -> None:
        """Take the lock, learn what the folder was made with and what is done. On failure all is given back."""
        if self._state != "new":
            raise ClosedError(f"this store was opened before ({self._state}); make another")
        self._state = "opening"
        try:
            await self._in_thread(self._writer.open, scan=scan)
        except BaseException:
            await self.aclose(complete=False)
            raise
        self._state = "open"

    async def scan(self) -> None:
        """Find out what is done, and repair what a killed run left."""
        self._require_open()
        await self._in_thread(self._writer.scan)

    async def claim(self, fingerprint: Mapping[str, object], made_with: Mapping[str, object]) -> None:
        """Compare the folder's fingerprint with this run's, or record it in a new folder."""
        self._require_open()
        await self._in_thread(self._writer.claim, fingerprint, made_with)

    async def find(self, texts: Sequence[str]) -> list[Found]:
        """What is known of each text, in one hop."""
        self._require_open()
        return await self._in_thread(self._find, texts)

    def _find(self, texts: Sequence[str]) -> list[Found]:
        ids = list(map(text_id, texts))
        return list(map(Found, ids, self._writer.done.contains_many(ids), self._writer.written(ids)))

    async def read_many(self, ids: Sequence[str]) -> list[StoredText | CorruptRecordError]:
        """The stored texts, each checked; an error in the place of one that is damaged or gone."""
        self._require_open()
        return await self._in_thread(self._writer.read_many, ids)

    async def some(self, n_texts: int) -> list[StoredText]:
        """A few texts of earlier runs, at random from those that the folder lists first, of those that are right."""
        self._require_open()
        return await self._in_thread(self._writer.some, n_texts)

    async def commit(self, records: Sequence[EmbeddedText]) -> None:
        """Save a micro-batch in one hop.

        A new text becomes a file and a row of the ledger; one that is cached, or was saved by this run already, at
        most one more key; a failed one a row and a line of `errors.jsonl`.
        """
        self._require_open()
        # Shielded: cancelled while it waits for the thread, a commit would be withdrawn and its records lost.
        await asyncio.shield(asyncio.ensure_future(self._in_thread(self._writer.commit, records)))

    async def reject(self, rows: Sequence[tuple[str | None, Rejected]]) -> None:
        """Write skipped rows, each with its place (`file.csv:12`), to `errors.jsonl`."""
        self._require_open()
        await self._in_thread(self._writer.reject, rows)

    async def aclose(self, *, complete: bool = True) -> None:
        """Complete the ledger if anything changed, release the lock and end the thread. Idempotent.

        The lock is released whatever happens, also if this call is cancelled: the thread does it by itself.
        """
        if self._state == "closed":
            return
        self._state = "closed"
        try:
            # Not through `_in_thread`: a cancellation must not take the call back before the thread has begun it.
            closing = self._worker.executor.submit(self._writer.close, complete)
            with anyio.CancelScope(shield=True):
                await asyncio.shield(asyncio.wrap_future(closing))
        finally:
            await self._worker.aclose()

    def _require_open(self) -> None:
        if self._state != "open":
            raise ClosedError(f"{self._writer.paths.root}: the store is {self._state}; open it first, and once")

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the store's thread, with aiofiles' wrapper and our executor."""
        call: Callable[..., Any] = aiofiles.os.wrap(function)
        result: T = await call(*args, executor=self._worker.executor, **kwargs)
        return result
