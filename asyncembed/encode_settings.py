"""The keyword arguments of `SentenceTransformer.encode` as options of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncembed.errors import OptionsError

_ACT = ("device", "batch_size", "normalize_embeddings", "prompt", "prompt_name", "truncate_dim", "task")
_CHANGE_NOTHING = (
    "convert_to_numpy",
    "convert_to_tensor",
    "show_progress_bar",
    "num_workers",
    "pool",
    "chunk_size",
)
"""What says how `encode` computes or in which container it answers, in any of its versions: taken with any value."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "output_value": ("sentence_embedding",),
    "precision": ("float32", None),
    "is_pretokenized": (False, None),
    "processing_kwargs": (None, {}),
    "modality": ("text", None),
}
"""What changes the meaning of the answer, with the values that do not."""

_TEXTS = ("sentences", "inputs")


def options_of(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that arguments of `encode` stand for.

    Raises:
        OptionsError: An argument is unknown, or its value asks for what is not made here.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise OptionsError(f"model_settings must hold arguments of `encode` by name, as a dict; it is {settings!r}")
    for name, value in settings.items():
        if name in _ONLY and not any(value is allowed or value == allowed for allowed in _ONLY[name]):
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise OptionsError(f"model_settings: {name}={value!r} is not supported here, only {allowed}")
        if name in _TEXTS and value is not None:
            raise OptionsError(f"model_settings: {name!r} are given when the generator is called")
        if name not in (*_ACT, *_CHANGE_NOTHING, *_ONLY, *_TEXTS):
            raise OptionsError(
                f"model_settings: unknown setting {name!r}; there are {', '.join([*_ACT, *_CHANGE_NOTHING, *_ONLY])}"
            )
    found = {name: settings[name] for name in _ACT if settings.get(name) is not None}
    if "device" in found:
        found["device"] = _device_of(found["device"])
    if "normalize_embeddings" in found:
        found["normalize_embeddings"] = bool(found["normalize_embeddings"])
    for name in ("batch_size", "truncate_dim"):
        if hasattr(found.get(name), "item"):  # a number of NumPy or torch
            found[name] = found[name].item()
    return found


def _device_of(device: Any) -> str:
    """A device by name, as torch's object, by the number of a GPU, or as a list of one."""
    if isinstance(device, (list, tuple)):
        if len(device) > 1:
            raise OptionsError(f"model_settings: device={device!r} names several; one runs here, so name one")
        return _device_of(device[0]) if device else "auto"
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}"
    return str(device)
