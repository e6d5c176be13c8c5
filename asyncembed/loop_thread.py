"""An event loop in a thread of its own, for callers that have none or whose loop is busy with them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from asyncembed.errors import ClosedError
from asyncembed.sources.feed import Handoff
from asyncembed.stream import EmbedStream


class LoopThread:
    """A stream awaited in a thread of its own, so that the caller's loop, if any, is left alone."""

    def __init__(self, stream: EmbedStream, handoff: Handoff) -> None:
        self._stream = stream
        self._handoff = handoff
        self._future: Future[dict[str, list[float] | None]] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="asyncembed-generator", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<LoopThread {'over' if self._future.done() else 'running'} {self._stream!r}>"

    def result(self) -> dict[str, list[float] | None]:
        """Wait for the job's end: text → vector as a list, or None.

        Raises:
            Exception: What the job raised.
        """
        found = self._future.result()
        self._thread.join()
        return found

    def cancel(self) -> None:
        """Cancel the job if it still runs, and wait for its end."""
        self._cancelled = True
        self._handoff.close()
        if self._loop is not None and self._task is not None and not self._future.done():
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._future.set_result(asyncio.run(self._collect()))
        except BaseException as error:  # handed to the calling thread, which raises it
            self._future.set_exception(
                ClosedError("the job was cancelled") if isinstance(error, asyncio.CancelledError) else error
            )
        finally:
            self._handoff.close()

    async def _collect(self) -> dict[str, list[float] | None]:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self._cancelled:
            raise ClosedError("the job was cancelled")
        vectors = await self._stream
        return {text: None if vector is None else vector.tolist() for text, vector in vectors.items()}
