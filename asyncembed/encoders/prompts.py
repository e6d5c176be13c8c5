"""What the model is told with a text: the prompt before it, and the task or route of a model that has several."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from asyncembed.encoders.base import Encoder, Tokenizer
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import Blanks, EmbedOptions

logger = logging.getLogger("asyncembed")

_KIND = "SentenceTransformer"
_MAKES = {
    "SparseEncoder": "sparse vectors",
    "CrossEncoder": "scores of pairs of texts",
    "MultiVectorEncoder": "a vector of each token",
    "ColBERT": "a vector of each token",
}
_MODEL_FILES = ("modules.json", "config.json", "adapter_config.json")


def check_kind(folder: Path, model: str | os.PathLike[str]) -> None:
    """Refuse a folder of another kind, whose weights sentence-transformers would load and pool all the same."""
    if not any((folder / name).is_file() for name in _MODEL_FILES):
        raise ModelError(f"there is no model in {folder}: it holds none of {', '.join(_MODEL_FILES)}")
    _check(os.fspath(model), _settings(folder, "config_sentence_transformers.json").get("model_type"))
    if (folder / "modules.json").is_file():
        if b'"pylate.' in (folder / "modules.json").read_bytes():  # named before the loader takes it for unknown code
            _check(os.fspath(model), "ColBERT")
        return
    architectures = _settings(folder, "config.json").get("architectures") or [""]
    if str(architectures[0]).endswith("ForSequenceClassification"):
        raise ModelError(
            f"the model {os.fspath(model)!r} is a classifier or reranker ({architectures[0]}): it makes scores, and no "
            "embeddings of texts"
        )
    logger.warning(
        "the model %s does not say how tokens' vectors become one of the text; sentence-transformers' default is used",
        os.fspath(model),
    )


def check_live(model: Any) -> None:
    """Refuse a live model of another kind, and say it of one whose own `encode` does something else."""
    _check(type(model).__name__, getattr(model, "model_type", None))
    if not getattr(model.encode, "__module__", "").startswith("sentence_transformers."):
        logger.warning(
            "%s has an encode() of its own, which is not used: its modules are given token ids, and what it does to "
            "texts or vectors besides is left out",
            type(model).__name__,
        )


def _check(name: str, kind: Any) -> None:
    if kind not in (None, _KIND):
        makes = _MAKES.get(str(kind), "something else")
        raise ModelError(f"the model {name!r} is a {kind}: it makes {makes}, and not one dense vector of a text")


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """A file of settings; nothing if there is none, or it is damaged: then loading says so."""
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Route(list[Any]):
    """The modules that a text passes first, with what is asked of a model about its input."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None if there is none."""
        return getattr(self[0], "tokenizer", None)

    def get_max_seq_length(self) -> Any:
        """Most tokens of a row, as the first module says."""
        return getattr(self[0], "max_seq_length", None)


def router_of(model: Any) -> Any | None:
    """The module that sends a text one of several ways; None if there is but one."""
    first = model[0]
    return first if hasattr(first, "sub_modules") and hasattr(first, "_resolve_route") else None


def takes_tasks(model: Any) -> bool:
    """Whether a task can change a vector."""
    if router_of(model) is not None or "task" in model.get_model_kwargs():
        return True
    first = model[0]
    if any(getattr(first, name, None) is not None for name in ("query_length", "document_length", "query_expansion")):
        return True
    preprocess = getattr(first, "preprocess", None) or getattr(first, "tokenize", None)
    return preprocess is not None and "task" in inspect.signature(preprocess).parameters


def resolve_task(model: Any, task: str | None) -> str | None:
    """The task as a model that takes tasks means it."""
    router = router_of(model)
    if router is not None:
        _route_name(router, task)
    return task


def route_of(model: Any, task: str | None) -> Route:
    """The modules that a text of a task passes first."""
    router = router_of(model)
    return Route([model[0]] if router is None else router.sub_modules[_route_name(router, task)])


def task_limit(route: Route, task: str | None) -> int | None:
    """Most tokens of a row of this task, where the model has a limit of its own for it."""
    limit: int | None = getattr(route[0], f"{task}_length", None) if task in COMMON_TASKS else None
    return limit


def first_task(model: Any) -> str | None:
    """A task that the model can be tried with: None, unless it has routes and no default one."""
    router = router_of(model)
    if router is None or _find(router, None) is not None:
        return None
    return next(iter(_tasks_of(router)), None)


def _find(router: Any, task: str | None) -> str | None:
    try:
        name: str = router._resolve_route(task=task, modality="text")
    except ValueError:
        return None
    return name


def _route_name(router: Any, task: str | None) -> str:
    name = _find(router, task)
    if name is None:
        named = " or ".join(f"task={known!r}" for known in _tasks_of(router)) or "none of them takes texts"
        problem = "the model has several routes and no default" if task is None else f"no route for task={task!r}"
        raise OptionsError(f"{problem}; there is {named}")
    return name


def _tasks_of(router: Any) -> list[str]:
    names = dict.fromkeys([*router.sub_modules, *(task for task, _ in router.route_mappings if task)])
    return [name for name in names if _find(router, name) is not None]


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
    """What stands before every chunk: the prompt given, the model's own of that name, or its default."""
    if prompt is not None:
        return prompt
    if prompt_name is None:
        return encoder.prompt
    prompts = prompts_of(encoder)
    if prompt_name not in prompts:
        raise OptionsError(f"the model has no prompt named {prompt_name!r}; it has {sorted(prompts)}")
    return prompts[prompt_name]


def task_of(encoder: Encoder, task: str | None) -> str | None:
    """The task as far as it matters: None for a model without tasks."""
    resolve = getattr(encoder, "resolve_task", None)
    if resolve is None:
        return without_tasks(task)
    found: str | None = resolve(task)
    return found


def without_tasks(task: str | None) -> str | None:
    """What a task is to a model without tasks: nothing."""
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
    """What the model is told with every text of a job."""
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
