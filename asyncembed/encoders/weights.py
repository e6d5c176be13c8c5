"""One hash for a model's weights, the same for a path and for the live model loaded from it; and one for its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from asyncembed.cache import cache_folder, write_small

_MODULE = re.compile(r"^(\d+\.)(?:auto_model\.|model\.)?")
_HASHED_WHOLE = 1 << 30  # bytes: half a second or so with a processor's own SHA-256
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 20
_IGNORED = (".md", ".onnx", ".h5", ".msgpack", ".ot", ".pyc")
_IGNORED_FOLDERS = re.compile(r"\.|checkpoint-\d|(onnx|openvino|__pycache__)$")


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of floating-point torch tensors, in order of their names.

    Names are taken without the wrapper's own attribute names, and integer buffers (position ids) are left out: they
    come and go between library versions and change no vector.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors, key=_canonical):
        tensor = tensors[name]
        if not (torch.is_tensor(tensor) and tensor.is_floating_point()):
            continue
        flat = tensor.detach().to("cpu").contiguous()
        header = f"{_canonical(name)} {str(flat.dtype).removeprefix('torch.')} {list(flat.shape)}\n"
        digest.update(header.encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def contents_hash(folder: Path) -> str:
    """SHA-256 over names and contents of the files in a model's folder that may change a vector.

    Names, sizes and times alone do not tell: an exchange by `cp -p`, `rsync -t` or a reproducible image keeps them.
    Left out are documentation, formats that nothing here reads, training checkpoints and hidden folders.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in _IGNORED or any(map(_IGNORED_FOLDERS.match, name.parts)) or not path.is_file():
            continue
        digest.update(json.dumps([name.as_posix(), _hash_or_samples(path)]).encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_SAMPLE_BYTES):
            digest.update(block)
    return digest.hexdigest()


def cached_hash(folder: Path | None, variant: str, compute: Callable[[], str]) -> str:
    """`compute()`, remembered in the user's cache for a folder of more than a gigabyte."""
    if folder is None or sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= _HASHED_WHOLE:
        return compute()
    key = hashlib.sha256(json.dumps([contents_hash(folder), variant]).encode()).hexdigest()
    remembered = cache_folder() / "weights" / f"{key}.sha256"
    try:
        known = remembered.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    value = compute()
    with suppress(OSError):  # a cache that cannot be written only costs the hash again
        write_small(remembered, value.encode())
    return value


def _hash_or_samples(path: Path) -> str:
    """The hash of a file; of one too large to be read at each start, that of samples, its times and its inode.

    No exchange keeps inode and time of change on a disk; on a read-only image that keeps all, the samples still tell.
    """
    try:
        status = path.stat()
        if status.st_size <= _HASHED_WHOLE:
            return file_hash(path)
        facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        digest = hashlib.sha256(repr(facts).encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(number * (status.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError:
        return ""  # what cannot be read is not part of the model either
    return digest.hexdigest()


def _canonical(name: str) -> str:
    return _MODULE.sub(r"\1", name)
