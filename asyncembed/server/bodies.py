"""Reading the bodies of requests, no more of them at a time than there is room for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from starlette.requests import Request

from asyncembed.server.faults import ApiError, overloaded, too_large

READ_S = 60.0
"""Seconds a body may take to arrive: one that stalls would hold its room for ever."""

SMALL_BYTES = 1 << 16
"""A body up to this size is read whatever else is: large ones that are slow must not shut all others out."""


class Bodies:
    """Counts the bytes of bodies that are held, being read or waiting to be parsed."""

    def __init__(self, max_bytes: int, max_total_bytes: int, read_s: float = READ_S) -> None:
        self.max_bytes = max_bytes
        self.max_total_bytes = max(max_bytes, max_total_bytes)
        self.small_bytes = SMALL_BYTES
        self.read_s = read_s
        self.n_bytes = 0

    def __repr__(self) -> str:
        return f"<Bodies {self.n_bytes}/{self.max_total_bytes} bytes>"

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, held for the time of the block.

        Raises:
            ApiError: It is too large, 413, too slow, 408, or too many are being read, 429.
            ClientDisconnect: The client went away.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large(f"{int(declared)} bytes")
        pieces: list[bytes] = []
        try:
            await self._receive(request, pieces)
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self.n_bytes -= sum(map(len, pieces))

    async def _receive(self, request: Request, pieces: list[bytes]) -> None:
        n_bytes = 0
        try:
            with anyio.fail_after(self.read_s):
                async for piece in request.stream():
                    pieces.append(piece)
                    n_bytes += len(piece)
                    self.n_bytes += len(piece)
                    if n_bytes > self.max_bytes:
                        raise self._too_large(f"more than {self.max_bytes} bytes")
                    if n_bytes > self.small_bytes and self.n_bytes > self.max_total_bytes:
                        raise overloaded("too many large requests are being read; try again later", 1)
        except TimeoutError:
            message = f"the body did not arrive within {self.read_s:g} seconds"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None

    def _too_large(self, size: str) -> Exception:
        return too_large(f"the body has {size}; this server takes {self.max_bytes}; send fewer texts in a request")
