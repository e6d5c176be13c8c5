"""The user's cache folder: what is learnt there is only ever made again if it is lost."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Where this library keeps what later starts need. It may not be there, nor writable."""
    try:
        return Path(platformdirs.user_cache_dir("asyncembed"))
    except RuntimeError:  # a user without a home, as in a container: a folder that cannot be made stands for none
        return Path(os.devnull) / "asyncembed"
