"""Reading the bodies of requests, no more of them at a time than there is room for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from asyncembed.server.faults import overloaded, too_large


class Bodies:
    """Counts the bytes of bodies that are held, being read or waiting to be parsed.

    Args:
        max_bytes: Most bytes of one.
        max_total_bytes: Most bytes of all together.
    """

    def __init__(self, max_bytes: int, max_total_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_total_bytes = max(max_bytes, max_total_bytes)
        self.n_bytes = 0

    def __repr__(self) -> str:
        return f"<Bodies {self.n_bytes}/{self.max_total_bytes} bytes>"

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, held for the time of the block.

        Raises:
            ApiError: It is too large, 413, or too many are being read, 429.
            ClientDisconnect: The client went away.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large(f"{int(declared)} bytes")
        pieces: list[bytes] = []
        n_bytes = 0
        try:
            async for piece in request.stream():
                n_bytes += len(piece)
                self.n_bytes += len(piece)
                if n_bytes > self.max_bytes:
                    raise self._too_large(f"more than {self.max_bytes} bytes")
                if self.n_bytes > self.max_total_bytes:
                    raise overloaded("too many large requests are being read; try again later", 1)
                pieces.append(piece)
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self.n_bytes -= n_bytes

    def _too_large(self, size: str) -> Exception:
        return too_large(f"the body has {size}; this server takes {self.max_bytes}. Send fewer texts at once")
