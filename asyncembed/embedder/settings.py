"""What a caller may say to an embedder, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from asyncembed.errors import OptionsError
from asyncembed.lane import BULK, INTERACTIVE
from asyncembed.options import MODEL_OPTIONS, EmbedOptions
from asyncembed.records import AnyText, TokenText

Kind = Literal["text", "query", "document"]
Priority = Literal["interactive", "bulk"] | int

REQUEST_OPTIONS = (
    "chunk_size",
    "chunk_overlap",
    "long_texts",
    "prompt",
    "prompt_name",
    "normalize_embeddings",
    "truncate_dim",
)

LAST_PRIORITY = 100
_CLASSES = {"interactive": INTERACTIVE, "bulk": BULK}


def choose_options(model: Any, options: Mapping[str, Any]) -> EmbedOptions:
    """The options of an embedder.

    Raises:
        OptionsError: One is unknown, cannot be, or has no meaning without a job.
    """
    allowed = (*MODEL_OPTIONS, *REQUEST_OPTIONS)
    for name in options:
        if name not in allowed:
            raise OptionsError(f"{name!r} is no option of an AsyncEmbedder; there are {', '.join(allowed)}")
    return EmbedOptions.from_kwargs(model=model, save_path=None, **options)


def priority_of(priority: Priority) -> int:
    """The number of a class of urgency; lower is sooner.

    Raises:
        OptionsError: It is none.
    """
    if isinstance(priority, str) and priority in _CLASSES:
        return _CLASSES[priority]
    if isinstance(priority, int) and not isinstance(priority, bool) and INTERACTIVE <= priority <= LAST_PRIORITY:
        return priority
    raise OptionsError(
        f"priority={priority!r} is not 'interactive', 'bulk', or a whole number from {INTERACTIVE} to {LAST_PRIORITY}"
    )


def check_inputs(texts: Sequence[AnyText]) -> list[AnyText]:
    """The texts of a request that may give some as token ids, as a list of its own.

    Raises:
        OptionsError: There is something else among them.
    """
    if isinstance(texts, (str, TokenText)):
        return [texts]
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, (str, TokenText)):
            raise OptionsError(f"item {index} is neither text nor TokenText but {type(text).__name__}")
    return found


def check_texts(texts: str | Sequence[str]) -> list[str]:
    """The texts of a request, as a list of its own.

    Raises:
        OptionsError: There is something among them that is no `str`.
    """
    if isinstance(texts, str):
        return [texts]
    try:
        found = list(texts)
    except TypeError:
        raise OptionsError(f"embed takes a text or a list of texts, not {type(texts).__name__}") from None
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise OptionsError(f"item {index} is no text but {type(text).__name__}")
    return found


def check_deadline(deadline_s: object) -> None:
    """Refuse what is no time.

    Raises:
        OptionsError: It is neither None nor a number of seconds.
    """
    is_number = isinstance(deadline_s, (int, float)) and not isinstance(deadline_s, bool)
    if deadline_s is not None and (not is_number or deadline_s != deadline_s):
        raise OptionsError(f"deadline_s={deadline_s!r} must be a number of seconds, or None")
