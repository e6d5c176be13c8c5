"""The keyword arguments of `SentenceTransformer.encode` as options of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncembed.errors import OptionsError

_TO_OPTIONS = ("device", "batch_size", "normalize_embeddings", "prompt", "prompt_name", "truncate_dim", "task")
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    # Arguments of `encode` that change nothing here, with the values that say so.
    "output_value": ("sentence_embedding",),
    "precision": ("float32",),
    "convert_to_numpy": (True, False),
    "convert_to_tensor": (False,),
    "show_progress_bar": (True, False, None),
}


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that arguments of `encode` stand for.

    Raises:
        OptionsError: An argument is unknown, or its value asks for what is not made here.
    """
    for name, value in settings.items():
        if name in _ONLY_VALUE:
            if value not in _ONLY_VALUE[name]:
                allowed = " or ".join(map(repr, _ONLY_VALUE[name]))
                raise OptionsError(f"model_settings: {name}={value!r} is not supported here, only {allowed}")
        elif name not in _TO_OPTIONS:
            raise OptionsError(
                f"model_settings: unknown setting {name!r}; there are {', '.join([*_TO_OPTIONS, *_ONLY_VALUE])}"
            )
    return {name: settings[name] for name in _TO_OPTIONS if settings.get(name) is not None}
