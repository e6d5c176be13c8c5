"""What a folder of earlier results asks of a run before its model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncembed.sinks.folder import StorePaths, make_folders, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import index_state
from asyncembed.sinks.journal import journal_header
from asyncembed.sinks.lock import FolderLock


def recorded_in(folder: Path) -> Mapping[str, Any]:
    """The fingerprint of a folder, made if it is not there; nothing if none is recorded. Reads little, keeps no lock.

    Raises:
        StoreLockedError: Another job writes to it.
        StoreError: It cannot be used.
    """
    paths = StorePaths.of(folder)
    make_folders(paths)
    lock = FolderLock(paths)
    try:
        lock.acquire()
        with storage_errors(paths.root):
            return fingerprint_of(index_state(paths.index).header or journal_header(paths.journal))
    finally:
        lock.release()


def fingerprint_of(header: Header | None) -> Mapping[str, Any]:
    """The fingerprint in a header; nothing where there is none."""
    return header.fingerprint if header is not None else {}
