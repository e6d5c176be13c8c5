"""An embedder on an event loop in a thread of its own, for callers that have no loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

from asyncembed.embedder import AsyncEmbedder


class EmbedderThread:
    """Opens an embedder on a loop of its own; use the embedder's `embed_threadsafe`.

    The thread is a daemon: a program that forgets to close it still ends.
    """

    def __init__(self, make: Callable[[], AsyncEmbedder]) -> None:
        self._make = make
        self.opened: Future[AsyncEmbedder] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="asyncembed-embedder", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<EmbedderThread {'alive' if self._thread.is_alive() else 'ended'}>"

    def __enter__(self) -> EmbedderThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def embedder(self) -> AsyncEmbedder:
        """The embedder, when its model is loaded; waits for that. `opened` is the same as a future.

        Raises:
            Exception: What loading it raised.
        """
        return self.opened.result()

    def close(self) -> None:
        """Finish what was asked for, close the embedder and end the thread. Idempotent."""
        if self.opened.exception() is None and self._loop is not None:
            with suppress(RuntimeError):  # its loop has ended already
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # handed to whoever asks for the embedder
            if not self.opened.done():
                self.opened.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self._make() as embedder:
            self.opened.set_result(embedder)
            await self._closing.wait()
