"""What a folder of earlier results asks of a run, and the model that goes with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncembed.encoders import Encoder, load_encoder
from asyncembed.options import EmbedOptions
from asyncembed.sinks.folder import StorePaths, make_folders, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import index_state
from asyncembed.sinks.journal import journal_header
from asyncembed.sinks.lock import FolderLock
from asyncembed.sinks.origin import check_ours


def recorded_in(folder: Path | None) -> Mapping[str, Any]:
    """The fingerprint of a folder, made if it is not there; nothing if none is recorded. Reads little, keeps no lock.

    Raises:
        StoreLockedError: Another job writes to it.
        StoreError: It cannot be used.
    """
    if folder is None:
        return {}
    paths = StorePaths.of(folder)
    check_ours(paths)
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


def encoder_for(options: EmbedOptions, loaded: Encoder | None, recorded: Mapping[str, Any]) -> Encoder:
    """The model for a folder: the one that is loaded already, unless the folder records another precision.

    That is taken over where the user left it open; a live model has its own, and keeps it.

    Raises:
        OptionsError: An option does not go with the model.
        ModelError: It cannot be loaded.
    """
    wanted = recorded.get("dtype")
    is_open = isinstance(options.model, (str, os.PathLike)) and options.dtype == "auto"
    if loaded is not None and (not is_open or wanted in (None, loaded.dtype)):
        return loaded
    return load_encoder(options, dtype=wanted)
