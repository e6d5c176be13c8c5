"""The contestants of `--app`, as they run inside their own process.

`encode` is what apps do without an engine: one call a request, in a thread pool of one. `in process` is an
`AsyncEmbedder` on the clients' own event loop. `http` is a server process of its own; the clients are in this one.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from asyncembed import AsyncEmbedder, embed_stream
from asyncembed.encoders.loading import model_folder
from tests.benchmarks.contestants import Plan
from tests.benchmarks.load import Ask, Load, arrivals, closed_loop

BARE = "bare encode"
"""One caller, no event loop: what a single client is compared with."""


@dataclass(frozen=True, slots=True)
class AppPlan(Plan):
    """What a process of `--app` loads.

    Attributes:
        over_http: Whether the model is behind a server.
    """

    over_http: bool = False

    @property
    def name(self) -> str:
        """The contestant's name."""
        if self.backend == "encode":
            return "encode"
        return f"{'http' if self.over_http else 'in process'} {self.backend} {self.dtype}"


def make(plan: AppPlan, work: Path) -> Any:
    """The contestant of a plan."""
    if plan.backend == "encode":
        return EncodeApp(plan)
    return HttpApp(plan) if plan.over_http else EmbedderApp(plan)


class EncodeApp:
    """`SentenceTransformer.encode`, one call a request."""

    def __init__(self, plan: AppPlan) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        folder = model_folder(plan.model)
        self._model: Any = SentenceTransformer(str(folder or plan.model), device=plan.device)

    def measure(self, texts: list[str], n_clients: int) -> Load:
        """One turn of clients."""
        with ThreadPoolExecutor(1) as pool:

            async def ask(text: str) -> object:
                return await asyncio.get_running_loop().run_in_executor(pool, self._encode, text)

            before = _cpu_seconds(os.getpid())
            load = asyncio.run(closed_loop(lambda _: ask, texts, n_clients))
        load.cpu_seconds = _cpu_seconds(os.getpid()) - before
        load.rows = 1.0
        return load

    def bare(self, texts: list[str]) -> Load:
        """One caller, without an event loop."""
        latencies = []
        started = time.perf_counter()
        for text in texts:
            begun = time.perf_counter()
            self._encode(text)
            latencies.append(time.perf_counter() - begun)
        return Load(time.perf_counter() - started, latencies, rows=1.0)

    def _encode(self, text: str) -> object:
        return self._model.encode(text, show_progress_bar=False)


class EmbedderApp:
    """An `AsyncEmbedder` that stays open from turn to turn, on an event loop of its own."""

    def __init__(self, plan: AppPlan) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._embedder = AsyncEmbedder(
            plan.model, device=plan.device, backend=plan.backend, dtype=plan.dtype, long_texts="truncate"
        )
        self._run(self._embedder.__aenter__())

    def measure(self, texts: list[str], n_clients: int) -> Load:
        """One turn of clients."""
        before, cpu = self._embedder.statistics(), _cpu_seconds(os.getpid())
        load: Load = self._run(closed_loop(lambda _: self._embedder.embed, texts, n_clients))
        after = self._embedder.statistics()
        load.cpu_seconds = _cpu_seconds(os.getpid()) - cpu
        _fill(load, after.batches - before.batches, after.padded_tokens - before.padded_tokens)
        return load

    def bulk(self, texts: list[str], interactive: list[str], per_second: float) -> tuple[float, list[float], float]:
        """A job over the texts on the same model, with requests beside it.

        Returns:
            Seconds of the job, seconds of each request, and seconds of a batch on average.
        """
        before = self._embedder.statistics()
        seconds, latencies = self._run(self._bulk(texts, interactive, per_second))
        after = self._embedder.statistics()
        return seconds, latencies, (after.model_seconds - before.model_seconds) / (after.batches - before.batches)

    async def _bulk(self, texts: list[str], interactive: list[str], per_second: float) -> tuple[float, list[float]]:
        async def job() -> float:
            started = time.perf_counter()
            async with embed_stream(texts, embedder=self._embedder, save_path=None, long_texts="truncate") as stream:
                async for record in stream:
                    if record.error is not None:
                        raise RuntimeError(f"a text failed: {record.error}")
            return time.perf_counter() - started

        task = asyncio.create_task(job())
        latencies = await arrivals(self._embedder.embed, interactive, per_second, task) if interactive else []
        return await task, latencies

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class HttpApp:
    """A server process, and clients with a connection each in this one; they read answers, and parse the first."""

    def __init__(self, plan: AppPlan) -> None:
        options = ["--model", plan.model, "--device", plan.device, "--backend", plan.backend, "--dtype", plan.dtype]
        command = [sys.executable, "-m", "asyncembed.server", "--port", "0", "--long-texts", "truncate", *options]
        self._server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._port = self._wait_ready()
        threading.Thread(target=self._drain, daemon=True).start()

    def measure(self, texts: list[str], n_clients: int) -> Load:
        """One turn of clients."""
        cpu = _cpu_seconds(self._server.pid)
        load = asyncio.run(self._measure(texts, n_clients))
        load.cpu_seconds = _cpu_seconds(self._server.pid) - cpu
        return load

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        self._server.wait()

    async def _measure(self, texts: list[str], n_clients: int) -> Load:
        clients = [_HttpClient(*await asyncio.open_connection("127.0.0.1", self._port)) for _ in range(n_clients)]
        try:
            before = await clients[0].figures()
            load = await closed_loop(lambda number: clients[number].embed, texts, n_clients)
            after = await clients[0].figures()
        finally:
            for client in clients:
                client.close()
        batches, padded = (after[name] - before[name] for name in ("batches", "batch_padded_tokens"))
        _fill(load, int(batches), int(padded))
        return load

    def _wait_ready(self) -> int:
        assert self._server.stderr is not None
        port = None
        for line in self._server.stderr:
            found = re.search(r"listening on http://[^:]+:(\d+)", line)
            port = int(found[1]) if found else port
            if "ready:" in line and port is not None:
                return port
        raise RuntimeError("the server ended before it was ready")

    def _drain(self) -> None:
        assert self._server.stderr is not None
        for line in self._server.stderr:
            sys.stderr.write(line)


class _HttpClient:
    """The least that speaks HTTP, so that the clients take little of the processor they share with the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def embed(self, text: str) -> bytes:
        """One request."""
        body = orjson.dumps({"input": text})
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        return await self._ask(head.encode() + body)

    async def figures(self) -> dict[str, float]:
        """The server's counters."""
        text = (await self._ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")).decode()
        return {name: float(value) for name, value in re.findall(r"^asyncembed_(\w+)_total (\S+)$", text, re.M)}

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    async def _ask(self, request: bytes) -> bytes:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.I)
        if length is None:
            raise RuntimeError(f"an answer without its length: {head!r}")
        body = await self._reader.readexactly(int(length[1]))
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"refused: {body!r}")
        return body


def _fill(load: Load, batches: int, padded_tokens: int) -> None:
    load.batches = batches
    load.rows = len(load.latencies) / max(1, batches)
    load.padded_tokens = padded_tokens / max(1, batches)


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


__all__ = ["BARE", "AppPlan", "Ask", "make"]
