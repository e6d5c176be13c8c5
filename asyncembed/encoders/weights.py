"""One hash for a model's weights, the same for a path and for the live model loaded from it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncembed.cache import cache_folder

_MODULE = re.compile(r"^(\d+\.)(?:auto_model\.|model\.)?")
_WEIGHT_FILES = ("*.safetensors", "*.bin")


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


def cached_hash(folder: Path | None, variant: str, compute: Callable[[], str]) -> str:
    """`compute()`, remembered in the user's cache by size and modification time of the weight files in `folder`.

    Args:
        folder: Where the model was loaded from; None computes every time.
        variant: What else the hash depends on, such as the dtype it was loaded in.
        compute: Makes the hash.
    """
    files = sorted({path for pattern in _WEIGHT_FILES for path in folder.rglob(pattern)}) if folder else []
    if not files:
        return compute()
    remembered = cache_folder() / "weights" / f"{_cache_key(files, variant)}.sha256"
    try:
        known = remembered.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    value = compute()
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(value)
        temporary.replace(remembered)
    except OSError:
        pass  # a cache that cannot be written only costs the hash again
    return value


def _canonical(name: str) -> str:
    return _MODULE.sub(r"\1", name)


def _cache_key(files: Iterable[Path], variant: str) -> str:
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([facts, variant]).encode()).hexdigest()
