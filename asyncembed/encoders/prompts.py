"""What stands before a text: the prompt given, one of the model's own, or none."""

from __future__ import annotations

from collections.abc import Mapping

from asyncembed.encoders.base import Encoder
from asyncembed.errors import OptionsError

QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of a model's own prompts for queries and for documents, the first it has: those of sentence-transformers'
`encode_query` and `encode_document`."""


def prompts_of(encoder: Encoder) -> Mapping[str, str]:
    """The model's own prompts by name; nothing for an encoder without any."""
    prompts: Mapping[str, str] = getattr(encoder, "prompts", {})
    return prompts


def prompt_of(encoder: Encoder, prompt: str | None, prompt_name: str | None) -> str:
    """What stands before every chunk: the prompt given, the model's own of that name, or its default.

    Raises:
        OptionsError: The model has no prompt of that name, or either is no text.
    """
    for name, value in (("prompt", prompt), ("prompt_name", prompt_name)):
        if value is not None and not isinstance(value, str):
            raise OptionsError(f"{name}={value!r} must be text, or None")
    if prompt is not None:
        return prompt
    if prompt_name is None:
        return encoder.prompt
    prompts = prompts_of(encoder)
    if prompt_name not in prompts:
        raise OptionsError(f"the model has no prompt named {prompt_name!r}; it has {sorted(prompts)}")
    return prompts[prompt_name]


def first_prompt_of(encoder: Encoder, names: tuple[str, ...]) -> str:
    """The model's own prompt of the first of these names that it has; its default without any."""
    prompts = prompts_of(encoder)
    return next((prompts[name] for name in names if name in prompts), encoder.prompt)
