"""The bounded, memory-aware queue: a text waits here until there is room for its whole life in the pipeline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from asyncembed.records import AnyText, TokenText

logger = logging.getLogger("asyncembed")

BYTES_PER_TOKEN_ID = 4
BYTES_PER_JSON_FLOAT = 22
"""A float32 in JSON: at most 17 digits, sign, point, exponent and comma; 21 are seen for all-MiniLM-L6-v2."""
RECORD_OVERHEAD = 1500
"""Python objects of one text in flight: strings, arrays and records, measured with tracemalloc."""


def life_bytes(text: AnyText, dim: int, max_tokens: int, overlap: int = 0) -> int:
    """An up-front estimate of what a text takes until its record is delivered, in bytes.

    The text itself, its token ids as int32, a vector for each chunk, and the encoded JSON with the text again.
    Tokens are taken as two for three bytes of UTF-8: three times what English prose has, and just enough for code
    and for scripts that a vocabulary cuts into letters, where chunks are not quite full either.
    """
    if isinstance(text, TokenText):
        n_bytes, n_tokens = 2 * len(text.packed), len(text)
    elif text.isascii():
        n_bytes, n_tokens = len(text), 2 * len(text) // 3 + 1
    else:
        n_bytes, n_tokens = 4 * len(text), 2 * len(text.encode("utf-8", "surrogatepass")) // 3 + 1
    n_chunks = max(0, n_tokens - overlap) // max(1, max_tokens - overlap) + 1
    if n_chunks > 1 and overlap:  # every chunk but the first repeats so many tokens, as ids and as text
        repeated = 1 + overlap / max(1, max_tokens - overlap)
        n_bytes, n_tokens = int(n_bytes * repeated), int(n_tokens * repeated)
    vectors = (n_chunks + (n_chunks > 1)) * dim * (4 + BYTES_PER_JSON_FLOAT)
    return RECORD_OVERHEAD + 3 * n_bytes + n_tokens * BYTES_PER_TOKEN_ID + vectors


class AdmissionStatistics(NamedTuple):
    """The queue's state, bytes and texts."""

    reserved_bytes: int
    max_bytes: int
    n_in_flight: int
    n_waiting: int


class AdmissionQueue:
    """Lets texts in while their reservations fit the budget, first come first served.

    A reservation is made once, for the text's whole life, and never waited for again: holding one while waiting
    for more would be a deadlock. If nothing is in flight, a text larger than the whole budget is let in alone.
    """

    def __init__(self, max_bytes: int, under_pressure: Callable[[], bool] | None = None) -> None:
        self.max_bytes = max_bytes
        self._under_pressure = under_pressure or (lambda: False)
        self._reserved = 0
        self._in_flight = 0
        self._waiters: dict[asyncio.Future[None], int] = {}
        self._unmeasured = 0
        self._pressed = False
        self._warned = False

    def __repr__(self) -> str:
        return f"<AdmissionQueue {self._reserved}/{self.max_bytes} bytes in_flight={self._in_flight}>"

    def statistics(self) -> AdmissionStatistics:
        """The current state."""
        return AdmissionStatistics(self._reserved, self.max_bytes, self._in_flight, len(self._waiters))

    def reserve_nowait(self, n_bytes: int) -> bool:
        """Reserve if there is room now and nobody waits; whether it was done."""
        if self._waiters or not self._fits(n_bytes):
            return False
        self._take(n_bytes)
        return True

    async def reserve(self, n_bytes: int) -> None:
        """Reserve as soon as there is room. Cancelled while waiting, nothing is reserved."""
        if self.reserve_nowait(n_bytes):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = n_bytes
        try:
            await waiter
        except BaseException:
            if self._waiters.pop(waiter, None) is not None:
                self._admit()
            elif not waiter.cancelled():
                self.release(n_bytes)  # room was given in the same turn of the loop: hand it on
            raise

    def release(self, n_bytes: int) -> None:
        """Give a reservation back and let in who fits now."""
        self._reserved -= n_bytes
        self._in_flight -= 1
        if self._reserved < 0 or self._in_flight < 0:
            raise AssertionError("more was released than reserved: this is a bug")
        self._admit()

    def _fits(self, n_bytes: int) -> bool:
        if self._in_flight == 0:
            return True
        if self._reserved + n_bytes > self.max_bytes:
            return False
        # Under pressure a part of the budget stays open: batches must not shrink to one text while memory is elsewhere.
        return not self._is_pressed() or self._reserved + n_bytes <= self.max_bytes // 8

    def _is_pressed(self) -> bool:
        if self._pressed or self._unmeasured * 64 >= self.max_bytes:
            self._unmeasured = 0
            self._pressed = self._under_pressure()
            if self._pressed and not self._warned:
                self._warned = True
                logger.warning(
                    "the process has grown by more than max_memory_usage (%d bytes) since the model was loaded; "
                    "reading waits until it shrinks",
                    self.max_bytes,
                )
        return self._pressed

    def _take(self, n_bytes: int) -> None:
        self._reserved += n_bytes
        self._unmeasured += n_bytes
        self._in_flight += 1

    def _admit(self) -> None:
        while self._waiters:
            waiter, n_bytes = next(iter(self._waiters.items()))
            if not waiter.done() and not self._fits(n_bytes):
                return
            del self._waiters[waiter]
            if not waiter.done():  # else it was cancelled
                self._take(n_bytes)
                waiter.set_result(None)
