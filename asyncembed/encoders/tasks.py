"""The ways through a SentenceTransformer that has several: routes for queries and documents, adapters for tasks."""

from __future__ import annotations

import inspect
from typing import Any

from asyncembed.encoders.prompts import COMMON_TASKS
from asyncembed.errors import OptionsError


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
    """The task as a model that takes tasks means it.

    Raises:
        OptionsError: There is no such route, or no default one; the message names those there are.
    """
    router = router_of(model)
    if router is not None:
        _route_name(router, task)
    return task


def route_of(model: Any, task: str | None) -> Route:
    """The modules that a text of a task passes first.

    Raises:
        OptionsError: As `resolve_task`.
    """
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
