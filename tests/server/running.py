"""The server as tests need it: its app over a model in the test's hand, a listening one, or a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import httpx
import uvicorn

from asyncembed import AsyncEmbedder
from asyncembed.server.app import make_app
from asyncembed.server.service import Service
from asyncembed.server.settings import ServerSettings
from tests.cli.running import ENVIRONMENT, ROOT, heeding_ctrl_c

PROGRAM = [sys.executable, "-m", "asyncembed.server"]


@asynccontextmanager
async def opened(embedder: AsyncEmbedder, **settings: Any) -> AsyncIterator[Service]:
    """A service whose model is loaded."""
    ready = anyio.Event()
    service = Service(ServerSettings(**settings), embedder, on_ready=ready.set, on_broken=ready.set)
    async with anyio.create_task_group() as group:
        group.start_soon(service.run)
        try:
            with anyio.fail_after(60):
                await ready.wait()
            yield service
        finally:
            service.close()


def client(service: Service, **how: Any) -> httpx.AsyncClient:
    """A client of the app itself: no socket between."""
    transport = httpx.ASGITransport(app=make_app(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", **how)


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[int]:
    """The app behind a real socket, on this loop; its port."""
    config = uvicorn.Config(make_app(service), port=0, lifespan="off", ws="none", log_config=None)
    server = uvicorn.Server(config)
    server.capture_signals = _nothing  # type: ignore[method-assign]  # signals are the test runner's
    started = anyio.Event()
    startup = server.startup

    async def starting(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = starting  # type: ignore[method-assign]  # to hear of it
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve)
        try:
            await started.wait()
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class ServerProcess:
    """A server in a process of its own, and what it says on standard error.

    Args:
        arguments: Of the command line, besides the port, which is a free one.
        environment: More variables.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        with heeding_ctrl_c():
            self.process = subprocess.Popen(
                [*PROGRAM, "--port", "0", *arguments],
                cwd=ROOT, env={**ENVIRONMENT, **environment}, text=True, stderr=subprocess.PIPE,
            )  # fmt: skip
        self.seen = ""
        self._watchdog = threading.Timer(100, self.process.kill)  # a line that never comes ends the pipe instead
        self._watchdog.daemon = True
        self._watchdog.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait_for(self, words: str) -> str:
        """Read lines until one has the words, and return it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.seen += line
            if words in line:
                return line
        raise AssertionError(f"{words!r} never came; there was {self.seen!r}")

    def wait_ready(self) -> str:
        """Wait until it answers; its address."""
        url = self.wait_for("listening on").split("listening on ")[1].split(",")[0].strip()
        self.wait_for("ready:")
        return url
