"""What of a model may be loaded: weights that are data, and no code but what the user asked for."""

from __future__ import annotations

import os
from pathlib import Path

from asyncembed.errors import ModelError
from asyncembed.wording import first_line

_PICKLED = {
    "pytorch_model*.bin": ("model.safetensors", "model.safetensors.index.json"),
    "adapter_model*.bin": ("adapter_model.safetensors",),
}
"""Weights that torch pickles, and what is loaded in their place where it lies beside them."""


def check_weights(folder: Path, *, allow_pickle: bool) -> None:
    """Refuse a model whose weights, or those of one of its modules, are only there as a pickle.

    Raises:
        ModelError: Names the file and what to do.
    """
    if allow_pickle:
        return
    for pattern, instead in _PICKLED.items():
        for path in sorted(folder.rglob(pattern)):
            if not any((path.parent / name).exists() for name in instead):
                raise ModelError(
                    f"{path} is a pickle, and there is no {instead[0]} beside it; a pickle may hold more than weights. "
                    "Save the model anew as safetensors, or let such files be read, if you trust their maker, with "
                    "allow_pickle=True (--allow-pickle)"
                )


def loading_error(model: str | os.PathLike[str], error: Exception) -> ModelError:
    """Why a model could not be loaded, with what to do about it."""
    said = str(error)
    name = os.fspath(model)
    # 1. code in its folder   2. no safetensors on the hub   3. a pickle that is more than weights   4. anything else
    if "trust_remote_code" in said:
        return ModelError(
            f"the model {name!r} brings code of its own along, which is not run unless you say so; read it, and if you "
            "trust it, pass trust_remote_code=True (--trust-remote-code)"
        )
    if "use_safetensors=True" in said:
        return ModelError(
            f"the model {name!r} has no weights as safetensors, only as a pickle; if you trust its maker, pass "
            "allow_pickle=True (--allow-pickle)"
        )
    if "weights_only" in said:
        return ModelError(
            f"the model {name!r} cannot be loaded: its pickle holds more than weights, and none of it was run. "
            "Do not use it unless you know why"
        )
    return ModelError(
        f"the model {name!r} cannot be loaded: {first_line(error).rstrip('.')}. "
        "Give the path of a model's folder, or the name of one that can be downloaded"
    )
