"""The user's cache folder: what is learnt there is only ever made again if it is lost."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Where this library keeps what later starts need. It may not be there, nor writable."""
    try:
        return Path(platformdirs.user_cache_dir("asyncembed"))
    except RuntimeError:  # a user without a home, as in a container: a folder that cannot be made stands for none
        return Path(os.devnull) / "asyncembed"


def write_small(path: Path, data: bytes, *, flush: bool = False) -> None:
    """Put a file into place whole or not at all, with its folder; with `flush` it is on the disk before this returns.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
