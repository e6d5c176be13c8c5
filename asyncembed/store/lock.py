"""Who may write to a folder: one writer at a time, by a kernel lock, and nobody where another program's files are."""

from __future__ import annotations

import os
import re
import socket
from datetime import datetime, timezone

import filelock

from asyncembed.errors import CorruptRecordError, StoreError, StoreLockedError
from asyncembed.store.files import (
    StorePaths,
    decode_json,
    encode_json,
    remove,
    storage_error,
    storage_errors,
    write_whole,
)
from asyncembed.store.format import Format
from asyncembed.store.formats import format_of
from asyncembed.store.ledger import is_ours

# How the files begin that a job replaces or removes, also if somebody formatted them anew.
_INDEX = re.compile(
    rb'\A\s*\{\s*"(version"\s*:\s*\d+\s*,\s*")?fingerprint"\s*:\s*\{|"[0-9a-f]{64}"\s*:\s*\{\s*"status"'
)
_JOURNAL = re.compile(rb'\A\{"version":\d+[,}]')
_ERRORS = re.compile(rb'\A\s*\{\s*"(index"\s*:\s*(\d+|null)\s*,\s*"id|place"\s*:\s*("([^"\\]|\\.)*"|null)\s*,\s*"key)"')
_OWNER = re.compile(rb'\A\{"pid":')
_LOCK = re.compile(rb"\A\d+\s")  # where the file system has no locks; empty elsewhere
_RECORD = rb'\s*\{\s*"id"\s*:\s*"%b"'
_HEAD_BYTES = 1 << 16


class FolderLock:
    """The right to write to a folder, from `acquire` to `release`.

    Who holds it stands in a file of its own, written after the lock is held; one left by a dead process means nothing.
    """

    def __init__(self, paths: StorePaths) -> None:
        self._paths = paths
        self._lock: filelock.BaseFileLock | None = None

    def __repr__(self) -> str:
        return f"<FolderLock {self._paths.lock!r} {'free' if self._lock is None else 'held'}>"

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def acquire(self) -> None:
        """Take the lock at once or not at all."""
        lock = filelock.FileLock(self._paths.lock, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:  # an OSError as well: it goes first
            raise StoreLockedError(self._refusal()) from None
        except OSError as error:
            raise storage_error(self._paths.lock, error) from error
        except NotImplementedError as error:
            raise StoreError(f"{self._paths.root}: this file system has no locks; choose another save path") from error
        self._lock = lock
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        owner = encode_json({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        with storage_errors(self._paths.owner):
            write_whole(self._paths.owner, owner)

    def release(self) -> None:
        """Give the lock back. Idempotent; never fails for the sake of the owner's file."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            remove(self._paths.owner)
        except OSError:
            pass  # the folder may be gone or read-only by now; a free lock with an owner's file is free
        finally:
            lock.release()

    def _refusal(self) -> str:
        try:
            with open(self._paths.owner, "rb") as file:
                owner = decode_json(file.read())
            who = f"pid {owner['pid']} on host {owner['host']} is writing to it since {owner['started']}"
            if (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname()):
                who += (
                    ", in another job of this process that is still open: `async with embed_stream(…)` closes a job "
                    "that is left early, `close()` an EmbeddingGenerator that is used by steps"
                )
        except (OSError, ValueError, TypeError, KeyError):
            who = "another job is writing to it"
        return f"{self._paths.root}: {who}; wait for it to end, or choose another save path"


def check_ours(paths: StorePaths) -> None:
    """Refuse a folder in which another program's file has the name of one that a job replaces or removes.

    Where nothing else says that the folder is this library's, its per-text files are looked at too. Where something
    does, a ledger, index or text that cannot be read is damaged, and no stranger.
    """
    shapes = {paths.errors: _ERRORS, paths.owner: _OWNER, paths.lock: _LOCK}
    cores = {paths.journal: _JOURNAL, paths.index: _INDEX}
    with storage_errors(paths.root):
        heads = {path: _head(path) for path in (*shapes, *cores)}
        strange = [path for path, shape in shapes.items() if heads[path] and not shape.match(heads[path])]
        ledger_is_ours = is_ours(paths.ledger)
        strange += [paths.ledger] * (ledger_is_ours is False)
        if not ledger_is_ours and not any(shape.search(heads[path]) for path, shape in cores.items()):
            texts = format_of(paths)
            n_texts = 0
            for identity in (identity for block in texts.ids() for identity in block):
                n_texts += 1
                if not _is_record(texts, identity):
                    strange.append(texts.place(identity))
                    break
            if not n_texts:
                strange += [path for path in cores if heads[path]]
                strange += [paths.ledger] * bool(ledger_is_ours is None and _head(paths.ledger))
    if strange:
        raise StoreError(
            f"{strange[0]}: this file is not asyncembed's, and a job would replace or remove it; move it away, or "
            "choose another save path"
        )


def _head(path: str) -> bytes:
    """How a file begins; empty if there is none, or nothing but the zeros that a power cut leaves."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES).lstrip(b"\0")


def _is_record(texts: Format, identity: str) -> bool:
    """Whether a file is a text's, be it torn."""
    head = _head(texts.place(identity))
    if not head or re.match(_RECORD % identity.encode(), head):
        return True
    try:
        return texts.read(identity).id == identity
    except CorruptRecordError:
        return False
