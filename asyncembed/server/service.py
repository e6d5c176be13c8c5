"""The model behind the server: its life, its numbers, and what its errors mean to a client."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import anyio
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncembed.embedder import AsyncEmbedder, CountedVectors, EmbedderStatistics
from asyncembed.errors import ClosedError, ModelError, OptionsError, OverloadedError, TextError
from asyncembed.server.schema import SERVER, ApiError, Bodies, EmbeddingsRequest, overloaded, too_large, unavailable
from asyncembed.server.settings import ServerSettings
from asyncembed.threads import WorkerThread
from asyncembed.wording import plural

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of seconds."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS: tuple[tuple[str, str, Callable[[EmbedderStatistics], float]], ...] = (
    ("texts", "Texts that were let in.", lambda now: now.texts),
    ("cache_hits", "Texts answered from the cache.", lambda now: now.cache_hits),
    ("truncations", "Texts that were computed without their end.", lambda now: now.truncations),
    ("batches", "Batches that ran.", lambda now: now.batches),
    ("batch_row_tokens", "Tokens of all rows of all batches, without padding.", lambda now: now.row_tokens),
    ("batch_padded_tokens", "Tokens of all batches, with padding.", lambda now: now.padded_tokens),
    ("ooms", "Batches that ran out of memory and were run again in parts.", lambda now: now.ooms),
    ("model_seconds", "How long batches took, added up.", lambda now: now.model_seconds),
)
_GAUGES: tuple[tuple[str, str, Callable[[EmbedderStatistics], float]], ...] = (
    ("ready", "1 if the model is loaded and takes requests.", lambda now: now.state == "open"),
    ("queue_requests", "Requests without an answer.", lambda now: now.pending_requests),
    ("queue_chunks", "Chunks of texts that wait for the model.", lambda now: now.waiting_chunks),
    ("queue_bytes", "What the texts under way have reserved.", lambda now: now.pending_bytes),
    ("queue_max_bytes", "What they may reserve.", lambda now: now.max_pending_bytes),
    ("cache_bytes", "What the cache holds.", lambda now: now.cache_bytes),
    ("token_limit", "The present limit of a batch in padded tokens.", lambda now: now.token_limit),
    (
        "batch_fill",
        "Tokens of a batch on average since the start, with padding, over the present limit.",
        lambda now: now.padded_tokens / max(1, now.batches * now.token_limit),
    ),
)


class Metrics:
    """The server's figures, in a registry of its own."""

    def __init__(self, statistics: Callable[[], EmbedderStatistics]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "asyncembed_requests", "Requests by path and status; 499: the client went away.", ("path", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "asyncembed_request_seconds", "Seconds from the head of a request to its answer's end.", ("path",),
            buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "asyncembed_tokens", "Tokens of the texts that were answered, without prompt and special tokens.",
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Statistics(statistics))

    def observe(self, path: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_tokens(self, n_tokens: int) -> None:
        """Texts of so many tokens were answered."""
        self._tokens.inc(n_tokens)

    def exposition(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Statistics(Collector):
    """The embedder's own figures, read when they are asked for."""

    def __init__(self, statistics: Callable[[], EmbedderStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """One sample of each."""
        now = self._statistics()
        for name, meaning, read in _COUNTERS:
            yield CounterMetricFamily(f"asyncembed_{name}", meaning, value=read(now))
        for name, meaning, read in _GAUGES:
            yield GaugeMetricFamily(f"asyncembed_{name}", meaning, value=read(now))


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
        """Let a request in now, or not at all."""
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
