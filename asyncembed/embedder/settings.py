"""What a caller may say to an embedder, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from asyncembed.encoders import KINDS, Encoder, Instruction, Kind, kind_prompt_of, kind_task_of, prompt_of, task_of
from asyncembed.engine.scheduler import BULK, INTERACTIVE
from asyncembed.errors import OptionsError, TextTypeError
from asyncembed.iterables import why_other_items, without_line_ends
from asyncembed.options import MODEL_OPTIONS, REQUEST_OPTIONS, Blanks, EmbedOptions, check_prompt
from asyncembed.records import AnyText, TokenText
from asyncembed.wording import kind_of, why_no_text

Priority = Literal["interactive", "bulk"] | int

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


class HowOptions(TypedDict, total=False):
    """The fields of `How` as keyword arguments."""

    kind: Kind
    prompt: str | None
    prompt_name: str | None
    task: str | None
    blanks: Blanks
    priority: Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a call wants its texts embedded; `AsyncEmbedder.embed` explains each.

    Raises:
        OptionsError: One of them cannot be.
    """

    kind: Kind = "text"
    prompt: str | None = None
    prompt_name: str | None = None
    task: str | None = None
    blanks: Blanks = "error"
    priority: Priority = "interactive"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> How:
        """What a call names, checked; what no call has is a `TypeError` that names those there are."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise TypeError(f"{name!r} is no argument of this call; there are {', '.join(names)}")
        return cls(**given)

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("blanks", get_args(Blanks))):
            if getattr(self, name) not in allowed:
                raise OptionsError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        for name in ("prompt", "prompt_name", "task"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise OptionsError(f"{name}={getattr(self, name)!r} must be text, or None")
        check_prompt("prompt", self.prompt)
        priority_of(self.priority)

    def instruction(
        self, encoder: Encoder, options: EmbedOptions, kind_prompts: Mapping[Kind, str | None]
    ) -> Instruction:
        """What the model is told with the texts.

        The prompt is the first of: the call's own, the embedder's for the kind, the model's for the kind if it is not
        empty, the embedder's for all.

        Raises:
            OptionsError: The model has no prompt of that name, or no such task.
        """
        given, of_kind = (self.prompt, self.prompt_name), kind_prompts.get(self.kind)
        if given != (None, None):
            prompt = prompt_of(encoder, *given)
        else:
            prompt = of_kind if of_kind is not None else kind_prompt_of(encoder, self.kind, options)
        task = kind_task_of(encoder, self.kind, options) if self.task is None else task_of(encoder, self.task)
        return Instruction(prompt, task)


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
        TextTypeError: It is no list, or there is something else in it.
    """
    if isinstance(texts, TokenText):
        return [texts]
    found: list[AnyText] = []
    for index, text in enumerate(_listed(texts)):
        if not isinstance(text, (str, TokenText)):
            raise TextTypeError(f"{why_no_text(f'item {index}', text)} or TokenText")
        found.append(text)
    return found


def check_texts(texts: object) -> list[str]:
    """The texts of a request, as a list of its own.

    Raises:
        TextTypeError: It is neither a text nor a list of texts.
    """
    found, faults = sort_texts(texts)
    for reason in faults.values():
        raise TextTypeError(reason)
    return found


def sort_texts(texts: object) -> tuple[list[str], dict[int, str]]:
    """The texts of a request, and by position why the other items are none.

    Raises:
        TextTypeError: It is neither a text nor a list.
    """
    items = _listed(texts)
    found = [item for item in items if isinstance(item, str)]
    if len(found) == len(items):
        return found, {}
    faults = {at: why_no_text(f"item {at}", item) for at, item in enumerate(items) if not isinstance(item, str)}
    return found, faults


def _listed(texts: object) -> list[Any]:
    """A text alone, or the items of anything that has an order, as a list of its own."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (bytes, bytearray, memoryview)):
        raise TextTypeError(f"a text or a list of texts is needed, not {kind_of(texts)}; decode it first")
    if isinstance(texts, (Mapping, set, frozenset)):
        raise TextTypeError(f"a text or a list of texts is needed, not {kind_of(texts)}; pass its texts in a list")
    if (reason := why_other_items(texts)) is not None:
        raise TextTypeError(reason)
    if not any(hasattr(texts, method) for method in ("__iter__", "__getitem__")):
        raise TextTypeError(f"a text or a list of texts is needed, not {kind_of(texts)}")
    return list(without_line_ends(texts))


def check_deadline(deadline_s: object) -> None:
    """Refuse what is no time.

    Raises:
        OptionsError: It is neither None nor a number of seconds.
    """
    is_number = isinstance(deadline_s, (int, float)) and not isinstance(deadline_s, bool)
    if deadline_s is not None and (not is_number or deadline_s != deadline_s):
        raise OptionsError(f"deadline_s={deadline_s!r} must be a number of seconds, or None")
