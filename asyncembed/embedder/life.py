"""The life of an embedder: loading, running, closing, what it says of itself, and its end in a forked process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

import anyio

from asyncembed.embedder.requests import Requests
from asyncembed.encoders import Encoder, load_encoder, tell_chunk_size
from asyncembed.engine.chunkers import InstructionChunkers, LongTextChunkers
from asyncembed.engine.client import EngineClient
from asyncembed.engine.engine import Engine
from asyncembed.engine.limit_memory import LimitMemory
from asyncembed.engine.model_thread import EncoderThread
from asyncembed.errors import AsyncEmbedError, ClosedError, ModelError
from asyncembed.options import EmbedOptions
from asyncembed.threads import WorkerThread, watch

State = Literal["new", "loading", "open", "closing", "closed", "broken"]


class EmbedderStatistics(NamedTuple):
    """What an embedder did, and what waits in it.

    Attributes:
        state: `new`, `loading`, `open`, `closing`, `closed` or `broken`.
        requests: Calls so far.
        texts: Texts of these calls that were let in.
        pending_requests: Calls without an answer.
        waiting_texts: Texts that wait for room.
        pending_bytes: What the texts under way have reserved.
        max_pending_bytes: What they may reserve.
        cache_bytes: What the cache holds.
        cache_hits: Texts answered from it.
        truncations: Texts that were computed without their end, by `long_texts="truncate"`.
        batches: Batches that ran, those of jobs on the same model included, as in all that follows.
        ooms: Batches that ran out of memory and were run again in parts.
        row_tokens: Tokens of all rows, without padding.
        padded_tokens: Tokens of all batches, with padding.
        waiting_chunks: Chunks that wait for the model.
        token_limit: The present limit of a batch in padded tokens.
        model_seconds: How long batches took, added up.
    """

    state: State
    requests: int = 0
    texts: int = 0
    pending_requests: int = 0
    waiting_texts: int = 0
    pending_bytes: int = 0
    max_pending_bytes: int = 0
    cache_bytes: int = 0
    cache_hits: int = 0
    truncations: int = 0
    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    waiting_chunks: int = 0
    token_limit: int = 0
    model_seconds: float = 0.0


logger = logging.getLogger("asyncembed")

Opened = TypeVar("Opened", bound="EmbedderLife")


class EmbedderLife:
    """The life of an embedder: it loads the model, keeps the engine running, and tells everyone when it ends."""

    def __init__(self, options: EmbedOptions, *, max_pending_bytes: int, cache_bytes: int) -> None:
        self.options = options
        self._max_bytes = max_pending_bytes
        self._cache_bytes = cache_bytes
        self._model_thread = WorkerThread("asyncembed-model")
        self._ready = asyncio.Event()
        self._handing_over = threading.Lock()
        self._state: State = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._client: EngineClient | None = None
        self._requests: Requests | None = None
        self._error: Exception | None = None
        self._limits: LimitMemory | None = None
        self._is_orphan = False

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an AsyncEmbedder cannot be copied or pickled: make one of the same model where it is needed")

    def __repr__(self) -> str:
        requests = f" {self._requests!r}" if self._requests is not None else ""
        return f"<{type(self).__name__} {self._state} {self.options.model!r}{requests}>"

    async def __aenter__(self: Opened) -> Opened:
        """Load the model.

        Raises:
            ModelError: It cannot be loaded.
            OptionsError: An option does not go with it.
            ClosedError: It was opened before, or closed while the model was loaded.
        """
        if self._state != "new":
            raise ClosedError("an AsyncEmbedder is opened once; make another one")
        self._loop = asyncio.get_running_loop()
        self._state = "loading"
        watch(self)
        # Its one task: kept, awaited and cancelled here.
        self._driver = self._loop.create_task(self._drive(), name="asyncembed-embedder")
        try:
            await self._ready.wait()
        except BaseException:
            self._driver.cancel()
            raise
        if self._error is not None:
            await asyncio.wait([self._driver])
            raise self._error
        self._check_open()  # it may have been closed meanwhile
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(drain=error is None)

    async def aclose(self, *, drain: bool = True) -> None:
        """Take no more requests, and end. Idempotent. Jobs on the model end with a `ClosedError`.

        Cancelled while it drains, it refuses the rest with a `ClosedError`, and leaves the model's thread to end by
        itself.
        """
        if self._is_orphan:
            return
        if self._driver is not None and asyncio.get_running_loop() is not (loop := self._driver.get_loop()):
            if not loop.is_closed():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.aclose(drain=drain), loop))
            return
        if self._driver is None:
            self._state = "closed"
            self._model_thread.executor.shutdown(wait=False)
            return
        with self._handing_over:
            if self._state in ("loading", "open"):
                self._state = "closing"
        try:
            if self._engine is not None and self._client is not None:
                self._engine.break_clients(_closed(), but=self._client)
            if self._requests is not None and drain:
                await self._requests.wait_idle()
        finally:
            self._end()
        if not self._driver.done():
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._driver])

    def _end(self) -> None:
        """Let the driver come to its end."""
        if self._engine is None or self._client is None or self._requests is None:
            if self._driver is not None:
                self._driver.cancel()
            return
        self._requests.fail_all(self._why_ended)
        self._client.stop()
        self._engine.close()

    async def _drive(self) -> None:
        """Load the model and work until the end; whatever ends it, everyone who waits is told."""
        try:
            encoder, chunkers = await self._model_thread.run(_load, self.options)
            self._limits = await self._model_thread.run(LimitMemory, encoder, self.options.token_limit)
            engine, client, requests = self._open(self._limits, chunkers)
            self._ready.set()
            async with anyio.create_task_group() as group:
                group.start_soon(self._guard, client.run, group.cancel_scope)
                group.start_soon(requests.run)
                await self._guard(engine.run, group.cancel_scope)
        except Exception as error:
            self._error = error
        finally:
            with self._handing_over:
                self._state = "broken" if self._error is not None else "closed"
            if self._engine is not None and self._requests is not None:
                if self._error is not None:
                    logger.error("the embedder has ended: %s", self._error)
                self._engine.break_clients(self._why_ended())
                self._requests.fail_all(self._why_ended)
            self._ready.set()
            await self._model_thread.aclose(self._limits.close if self._limits is not None else None)

    async def _guard(self, work: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
        """Run one half of the engine; an error of it ends the other half too."""
        try:
            await work()
        except Exception as error:
            if self._error is None:
                self._error = error
            scope.cancel()

    def _open(self, limits: LimitMemory, chunkers: InstructionChunkers) -> tuple[Engine, EngineClient, Requests]:
        options = self.options
        self._engine = Engine(
            EncoderThread(
                limits.encoder,
                limits.estimator,
                thread=self._model_thread,
                max_rows=options.batch_size,
                memory=limits,
            )
        )
        self._client = EngineClient(
            self._engine,
            chunkers,
            chunk_long=LongTextChunkers(limits.encoder, options),
            normalize=options.normalize_embeddings,
            truncate_dim=options.truncate_dim,
        )
        self._requests = Requests(
            self._client,
            limits.encoder.dim,
            chunkers.chunk_size,
            options.chunk_overlap,
            max_bytes=self._max_bytes,
            cache_bytes=self._cache_bytes,
        )
        if self._state == "loading":
            self._state = "open"
        return self._engine, self._client, self._requests

    def _open_requests(self) -> Requests:
        if self._requests is None:
            raise AssertionError("an open embedder has requests: this is a bug")
        return self._requests

    def _why_ended(self) -> Exception:
        """A new error for each who is told."""
        if self._error is None:
            return _closed()
        broken = ModelError(f"the embedder cannot go on: {self._error}")
        broken.__cause__ = self._error
        return broken

    @property
    def encoder(self) -> Encoder:
        """The model: its `name`, `device`, `dtype`, `dim`, `max_tokens`, ….

        Raises:
            ClosedError: It is not loaded yet.
        """
        if self._is_orphan:
            self._check_open()
        if self._engine is None:
            raise ClosedError("the model is not loaded; enter the embedder with `async with` first")
        return self._engine.encoder

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it gives."""
        return min(self.encoder.dim, self.options.truncate_dim or self.encoder.dim)

    def statistics(self) -> EmbedderStatistics:
        """What it did, and what waits."""
        if self._engine is None or self._client is None or self._requests is None:
            return EmbedderStatistics(self._state, max_pending_bytes=self._max_bytes)
        engine, requests = self._engine.statistics(), self._requests
        queues = (requests.urgent.statistics(), requests.later.statistics())
        return EmbedderStatistics(
            state=self._state,
            requests=requests.n_requests,
            texts=requests.n_texts,
            pending_requests=requests.n_pending,
            waiting_texts=sum(queue.n_waiting for queue in queues),
            pending_bytes=sum(queue.reserved_bytes for queue in queues),
            max_pending_bytes=self._max_bytes,
            cache_bytes=requests.cache.n_bytes,
            cache_hits=requests.cache.n_hits,
            truncations=self._client.truncated_texts,
            batches=engine.encoders.batches,
            ooms=engine.encoders.ooms,
            row_tokens=engine.encoders.row_tokens,
            padded_tokens=engine.encoders.padded_tokens,
            waiting_chunks=engine.heap.n_chunks,
            token_limit=engine.token_limit,
            model_seconds=engine.encoders.model_seconds,
        )

    async def engine(self) -> Engine:
        """The engine, for a job on the same model; waits while the model is being loaded.

        Raises:
            ClosedError: The embedder is not open.
            ModelError: It is broken.
        """
        await self._until_open()
        if self._engine is None:
            raise AssertionError("an open embedder has an engine: this is a bug")
        return self._engine

    async def _until_open(self) -> None:
        if self._state == "loading":
            await self._ready.wait()
        self._check_open()

    def orphan(self) -> None:
        """This is a child process, made by a fork: the model's thread and the event loop are the parent's."""
        self._handing_over = threading.Lock()  # whoever held it in the parent is not here to give it back
        self._is_orphan, self._state, self._driver = True, "closed", None

    def _check_open(self) -> None:
        if self._is_orphan:
            raise ClosedError("the embedder was opened before a fork, in the parent process: open one in this process")
        if self._state == "broken":
            raise self._why_ended()
        if self._state not in ("open", "loading"):
            hint = "enter it with `async with` first" if self._state == "new" else "it takes no more requests"
            raise ClosedError(f"the embedder is {'not open' if self._state == 'new' else self._state}: {hint}")


def _load(options: EmbedOptions) -> tuple[Encoder, InstructionChunkers]:
    encoder = load_encoder(options)
    chunkers = InstructionChunkers(encoder, options)
    tell_chunk_size(encoder, options, chunkers.chunk_size)
    return encoder, chunkers


def _closed() -> AsyncEmbedError:
    return ClosedError("the embedder was closed before this was done; make the same call on an open one")
