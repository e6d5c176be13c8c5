"""Which format a folder is in: the one place that names them all."""

from __future__ import annotations

from asyncembed.store.files import StorePaths
from asyncembed.store.format import Format
from asyncembed.store.json_files import JsonFiles


def format_of(paths: StorePaths, *, durable: bool = False) -> Format:
    """The texts of a folder; with `durable` what is appended outlives a power cut."""
    return JsonFiles(paths, durable=durable)
