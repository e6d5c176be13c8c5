"""The server's process: listen, load the model meanwhile, and drain at a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator

import anyio
import uvicorn

from asyncembed.cli.console import Exit
from asyncembed.cli.signals import Signals, leave
from asyncembed.errors import AsyncEmbedError
from asyncembed.server.app import make_app
from asyncembed.server.service import Service
from asyncembed.server.settings import ServerSettings

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections: one that they are about to use again is never closed by us."""

ANSWER_S = 5
"""How long the answer may take to those whose time to drain is over."""

Say = Callable[[str], None]


class ListenError(AsyncEmbedError):
    """The address cannot be listened on."""


class _Server(uvicorn.Server):
    """Leaves the signals to the program, and says when it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured here."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._on_listening()

    def stop(self) -> None:
        """Accept no more, answer what is under way, and end."""
        self.should_exit = True


def serve(settings: ServerSettings, signals: Signals, say: Say) -> int:
    """Serve until a signal, or until the model cannot go on.

    Returns:
        The exit code: 0 after a signal.
    """
    with bound(settings.host, settings.port) as listener:
        return asyncio.run(_serve(settings, signals, say, listener))


async def _serve(settings: ServerSettings, signals: Signals, say: Say, listener: socket.socket) -> int:
    def ready() -> None:
        encoder = service.embedder.encoder
        say(f"ready: {settings.names[0]} on {encoder.device}, {encoder.backend} in {encoder.dtype}")

    def stop() -> None:
        say(f"{signals.name}: no new requests; those under way are answered, for up to {settings.drain_s:g} s")
        server.stop()
        asyncio.get_running_loop().call_later(settings.drain_s, service.cut)

    service = Service(settings, on_ready=ready, on_broken=lambda: server.stop())
    config = uvicorn.Config(
        make_app(service),
        http="h11",  # the other parser, taken where it is installed, loses the bodies of Java's clients: they offer h2c
        lifespan="off",
        ws="none",
        interface="asgi3",
        log_config=None,
        log_level=logging.ERROR,  # its warnings are of what single clients send
        access_log=False,
        backlog=2048,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s) + ANSWER_S,
    )
    server = _Server(config, lambda: say(f"listening on {_url(listener)}, loading {settings.names[0]}"))
    with signals.stopping(asyncio.get_running_loop(), stop):
        async with anyio.create_task_group() as group:
            group.start_soon(service.run)
            await server.serve(sockets=[listener])
            if service.condition == "loading":
                leave(Exit.DONE)  # the loading of a model cannot be interrupted, and nobody waits for it now
            service.close()
    if service.error is not None:
        raise service.error
    return Exit.DONE


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, not listening yet."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Named as TCP: without it asyncio leaves Nagle's algorithm on in what is accepted, and as an answer is written
        # in two pieces, head and body, each would wait 40 ms for the client's delayed acknowledgement of the first.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error}") from error
    with listener:
        try:
            if os.name == "posix":  # elsewhere it would let two servers have one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ListenError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        listener.setblocking(False)
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
