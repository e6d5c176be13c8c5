"""What the model is told with a text: the prompt before it, and the task where a model has several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from asyncembed.encoders.base import Encoder, Tokenizer
from asyncembed.errors import OptionsError
from asyncembed.options import Blanks, EmbedOptions

Kind = Literal["text", "query", "document"]

_PROMPT_NAMES: dict[Kind, tuple[str, ...]] = {
    "text": (),
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
"""Names of a model's own prompts for a kind of text; the first it has is meant, as in sentence-transformers'
`encode_query` and `encode_document`."""

KINDS = tuple(_PROMPT_NAMES)

COMMON_TASKS = ("query", "document")
"""What `encode_query` and `encode_document` tell every model, also one that has no tasks."""


class Instruction(NamedTuple):
    """What the model is told with a text.

    Attributes:
        prompt: Put before every chunk; empty for none.
        task: Which of its routes or adapters the model takes; None for its default, and for a model without any.
        blanks: What becomes of a text without tokens: it is an `error`, or told the model as its `encode` does.
    """

    prompt: str = ""
    task: str | None = None
    blanks: Blanks = "error"


def prompts_of(encoder: Encoder) -> Mapping[str, str]:
    """The model's own prompts by name; nothing for an encoder without any."""
    prompts: Mapping[str, str] = getattr(encoder, "prompts", {})
    return prompts


def prompt_of(encoder: Encoder, prompt: str | None, prompt_name: str | None) -> str:
    """What stands before every chunk: the prompt given, the model's own of that name, or its default.

    Raises:
        OptionsError: The model has no prompt of that name.
    """
    if prompt is not None:
        return prompt
    if prompt_name is None:
        return encoder.prompt
    prompts = prompts_of(encoder)
    if prompt_name not in prompts:
        raise OptionsError(f"the model has no prompt named {prompt_name!r}; it has {sorted(prompts)}")
    return prompts[prompt_name]


def task_of(encoder: Encoder, task: str | None) -> str | None:
    """The task as far as it matters: None for a model without tasks.

    Raises:
        OptionsError: The model has no such task, or has no default and needs one; the message names those it has.
    """
    resolve = getattr(encoder, "resolve_task", None)
    if resolve is None:
        return without_tasks(task)
    found: str | None = resolve(task)
    return found


def without_tasks(task: str | None) -> str | None:
    """What a task is to a model without tasks: nothing.

    Raises:
        OptionsError: The task is not one that every model is told.
    """
    if task is not None and task not in COMMON_TASKS:
        raise OptionsError(f"task={task!r} means nothing to this model: it has no tasks")
    return None


def input_of(encoder: Encoder, task: str | None) -> tuple[Tokenizer, int]:
    """A tokenizer of the caller's own, and the most tokens of a row, for a task."""
    by_task = getattr(encoder, "input_of", None)
    if by_task is None:
        return encoder.tokenizer(), encoder.max_tokens
    found: tuple[Tokenizer, int] = by_task(task)
    return found


def instruction_of(encoder: Encoder, options: EmbedOptions) -> Instruction:
    """What the model is told with every text of a job.

    Raises:
        OptionsError: The model has no prompt of that name, or no such task.
    """
    return Instruction(prompt_of(encoder, options.prompt, options.prompt_name), task_of(encoder, options.task))


def kind_prompt_of(encoder: Encoder, kind: Kind, options: EmbedOptions) -> str:
    """What stands before a query or a document, where the call names no prompt.

    The model's own prompt of that kind; if it is empty, the one that the options name explicitly, since
    sentence-transformers gives every model empty prompts `query` and `document`.
    """
    prompts = prompts_of(encoder)
    own = next((prompts[name] for name in _PROMPT_NAMES[kind] if name in prompts), None)
    if own:
        return own
    # A prompt that is none of the model's own was given when the encoder was made.
    is_given = (options.prompt, options.prompt_name) != (None, None) or encoder.prompt not in prompts.values()
    return prompt_of(encoder, options.prompt, options.prompt_name) if own is None or is_given else own


def kind_task_of(encoder: Encoder, kind: Kind, options: EmbedOptions) -> str | None:
    """The task of a query or a document, where the call names none.

    The route of that name, if the model has routes; if it has not, the task that the options name explicitly.

    Raises:
        OptionsError: The model has routes, none of that name and no other was chosen.
    """
    given = options.task
    if kind == "text" or (given is not None and not getattr(encoder, "has_routes", False)):
        return task_of(encoder, given)
    try:
        return task_of(encoder, kind)
    except OptionsError:
        if given is None:
            raise
        return task_of(encoder, given)
