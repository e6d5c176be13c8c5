"""One writer a folder: a lock that the kernel holds for a process and frees when it dies."""

from __future__ import annotations

import os
import socket
from datetime import datetime, timezone

import filelock

from asyncembed.errors import StoreError, StoreLockedError
from asyncembed.sinks.codec import decode_json, encode_json
from asyncembed.sinks.folder import StorePaths, remove, storage_error, storage_errors, temporary_of, write_whole


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
        """Take the lock at once or not at all.

        Raises:
            StoreLockedError: Another job holds it; the message gives its pid and host.
            StoreError: The folder cannot be written to or its file system has no locks.
        """
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
            write_whole(self._paths.owner, temporary_of(self._paths.owner), owner)

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
