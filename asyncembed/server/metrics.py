"""What the server did, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncembed.embedder import EmbedderStatistics

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
