"""The model behind the server: its life, and what its errors mean to a client."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import anyio

from asyncembed.embedder import AsyncEmbedder, CountedVectors, EmbedderStatistics
from asyncembed.errors import ClosedError, ModelError, OptionsError, OverloadedError, TextError
from asyncembed.server.bodies import Bodies
from asyncembed.server.faults import SERVER, ApiError, overloaded, too_large, unavailable
from asyncembed.server.metrics import Metrics
from asyncembed.server.payload import EmbeddingsRequest
from asyncembed.server.settings import ServerSettings
from asyncembed.threads import WorkerThread
from asyncembed.wording import plural

LOADING_RETRY_S = 2
MAX_RETRY_S = 60

Condition = Literal["loading", "ready", "closing", "broken"]


class Service:
    """One model, loaded in the background, that answers until it is closed.

    Attributes:
        error: Why it cannot go on; None if it can.
        worker: A thread for JSON that is too large for the event loop.
    """

    def __init__(
        self,
        settings: ServerSettings,
        embedder: AsyncEmbedder | None = None,
        *,
        on_ready: Callable[[], object] = lambda: None,
        on_broken: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings = settings
        self.embedder = embedder if embedder is not None else AsyncEmbedder(settings.model, **settings.options)
        self.metrics = Metrics(self.embedder.statistics)
        self.bodies = Bodies(settings.max_body_bytes, self.embedder.statistics().max_pending_bytes)
        self.worker = WorkerThread("asyncembed-json")
        self.error: Exception | None = None
        self.created = int(time.time())
        self._on_ready = on_ready
        self._on_broken = on_broken
        self._is_ready = False
        self._closed = asyncio.Event()
        self._scopes: set[anyio.CancelScope] = set()

    def __repr__(self) -> str:
        return f"<Service {self.condition} {self.embedder!r}>"

    @property
    def condition(self) -> Condition:
        """Whether it can answer."""
        if self.error is not None:
            return "broken"
        if self._closed.is_set():
            return "closing"
        return "ready" if self._is_ready else "loading"

    def close(self) -> None:
        """Let `run` end. Idempotent."""
        self._closed.set()

    @contextmanager
    def under_way(self, scope: anyio.CancelScope) -> Iterator[None]:
        """For the time of the block, `cut` cancels the scope."""
        self._scopes.add(scope)
        try:
            yield
        finally:
            self._scopes.discard(scope)

    def cut(self) -> None:
        """End the requests that are under way."""
        for scope in self._scopes:
            scope.cancel()

    def cut_off(self) -> ApiError:
        """What a client is told whose request was cut."""
        return unavailable("the server ended before this was done", "shutting_down")

    async def run(self) -> None:
        """Load the model and keep it until `close`. What ends it is in `error`; nothing is raised."""
        try:
            async with self.embedder:
                self._is_ready = True
                self._on_ready()
                await self._closed.wait()
        except Exception as error:
            self._break(error)
        finally:
            await self.worker.aclose()

    def admit(self, asked: EmbeddingsRequest) -> asyncio.Future[CountedVectors]:
        """Let a request in now, or not at all.

        Raises:
            ApiError: The model is not there (503), does not go by that name (404), has fewer dimensions (400), or
                there is no room: now (429), or never (413).
        """
        self._check(asked)
        try:
            return self.embedder.embed_counted_nowait(
                asked.inputs, kind=asked.kind, prompt_name=asked.prompt_name, task=asked.task, blanks="encode"
            )
        except Exception as error:
            raise self.explained(error, asked) from error

    def explained(self, error: Exception, asked: EmbeddingsRequest) -> Exception:
        """What a client is told of an error; the error itself if nobody foresaw it."""
        if isinstance(error, TextError):
            place = f"input[{error.index}]" if asked.is_list else "input"
            message = f"'{place}' cannot be embedded: {shortened(error.reason, 400)}"
            return ApiError(400, message, param=place, code="text_not_embeddable")
        if isinstance(error, OverloadedError):
            if not error.can_fit:
                given = f"{plural(len(asked.inputs), 'text')} of this size"
                return too_large(f"{given} are more than this server holds; send fewer in a request", "too_many_texts")
            wait_s = retry_after_s(self.embedder.statistics())
            return overloaded(f"too much is under way; try again in {plural(wait_s, 'second')}", wait_s)
        if isinstance(error, OptionsError):
            param = "prompt_name" if str(error).startswith("the model has no prompt") else "task"
            return ApiError(400, shortened(str(error), 400), param=param)
        if isinstance(error, ClosedError):
            return unavailable("the server is being shut down", "shutting_down")
        if isinstance(error, ModelError):
            if self.embedder.statistics().state == "broken":
                self._break(error)
            return ApiError(500, f"the model cannot go on: {error}", kind=SERVER, code="model_error")
        return error

    def _check(self, asked: EmbeddingsRequest) -> None:
        if self.condition != "ready":
            raise self.why_not_ready()
        if asked.model is not None and asked.model not in self.settings.names:
            raise unknown_model(asked.model, self.settings)
        if asked.dimensions is not None and asked.dimensions > self.embedder.dim:
            raise ApiError(
                400,
                f"'dimensions' is {asked.dimensions}; a vector of this model has {self.embedder.dim}",
                param="dimensions",
            )

    def why_not_ready(self) -> ApiError:
        """What a client is told while there is no model."""
        if self.condition == "loading":
            return unavailable("the model is still being loaded; try again soon", "model_loading", LOADING_RETRY_S)
        if self.condition == "closing":
            return unavailable("the server is being shut down", "shutting_down")
        return unavailable("the model cannot go on; the server ends", "model_error")

    def _break(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self._closed.set()
            self._on_broken()


def shortened(text: str, size: int) -> str:
    """A text for a message, in so many characters: a client may send megabytes in the place of a name."""
    return text if len(text) <= size else f"{text[: size - 3]}..."


def unknown_model(name: str, settings: ServerSettings) -> ApiError:
    """There is no model of that name here."""
    own, *others = map(repr, settings.names)
    also = f", also called {', '.join(others)}" if others else ""
    message = f"The model '{shortened(name, 80)}' does not exist here; there is {own}{also}"
    return ApiError(404, message, param="model", code="model_not_found")


def retry_after_s(now: EmbedderStatistics) -> int:
    """When to come again: as long as what waits will take at the pace so far, in whole seconds from 1 to 60."""
    waiting_s = now.waiting_chunks * now.model_seconds / max(1, now.texts)
    return max(1, min(MAX_RETRY_S, math.ceil(waiting_s)))
