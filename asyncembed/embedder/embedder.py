"""The app's face of the engine: concurrent requests share batches, and jobs may share the model with them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, overload

import anyio

from asyncembed.assembly import Assembler
from asyncembed.embedder.chunkers import PromptChunkers
from asyncembed.embedder.desk import Desk, Request
from asyncembed.embedder.settings import Kind, Priority, check_texts, choose_options, priority_of
from asyncembed.encoders import (
    DOCUMENT_PROMPTS,
    QUERY_PROMPTS,
    Encoder,
    FloatMatrix,
    first_prompt_of,
    load_encoder,
    prompt_of,
)
from asyncembed.engine import Engine
from asyncembed.errors import AsyncEmbedError, ClosedError, DeadlineError, ModelError, OverloadedError
from asyncembed.lane import Lane
from asyncembed.limits import estimator_for
from asyncembed.memory import available_bytes
from asyncembed.options import DEFAULT_MODEL, EmbedOptions, parse_bytes
from asyncembed.records import EmbeddedText, FloatVector, text_id
from asyncembed.threads import WorkerThread

logger = logging.getLogger("asyncembed")

DEFAULT_PENDING_BYTES = 256 * 2**20
"""Room for some 20,000 short texts, or for as many as fit into a quarter of what is free."""

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
    batches: int = 0
    ooms: int = 0
    row_tokens: int = 0
    padded_tokens: int = 0
    waiting_chunks: int = 0
    token_limit: int = 0
    model_seconds: float = 0.0


class AsyncEmbedder:
    """One model for an async app. Requests of any number of tasks share batches the moment the model is free.

    Use it with `async with`: entering loads the model in a thread; leaving finishes what was asked for, or, left by
    an exception, refuses it. It lives on the event loop where it was entered; calls from other loops and threads
    (`embed_threadsafe`) are handed over to that loop.

    Args:
        model: A name, a path, a `SentenceTransformer`, or an `Encoder`.
        max_pending_bytes: What texts under way may take together, as an estimate of their whole life (some 12 KB for
            a short one); half of it is kept for interactive requests. None takes the smaller of 256 MiB and a quarter
            of what is free.
        cache_bytes: What to keep of the vectors used last; 0 keeps none.
        **options: Options of `EmbedOptions` about model, chunks and vectors: `device`, `backend`, `dtype`,
            `batch_size`, `token_limit`, `chunk_size`, `chunk_overlap`, `long_texts`, `prompt`, `prompt_name`,
            `normalize_embeddings`, `truncate_dim`, `trust_remote_code`.

    Raises:
        OptionsError: An option is unknown, cannot be, or has no meaning here.
    """

    def __init__(
        self,
        model: Any = DEFAULT_MODEL,
        *,
        max_pending_bytes: int | str | None = None,
        cache_bytes: int | str = 0,
        **options: Any,
    ) -> None:
        self.options: EmbedOptions = choose_options(model, options)
        self._max_bytes = (
            parse_bytes(max_pending_bytes)
            if max_pending_bytes is not None
            else max(1, min(DEFAULT_PENDING_BYTES, available_bytes() // 4))
        )
        self._cache_bytes = parse_bytes(cache_bytes) if cache_bytes != 0 else 0
        self._model_thread = WorkerThread("asyncembed-model")
        self._ready = asyncio.Event()
        self._handing_over = threading.Lock()
        self._state: State = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._lane: Lane | None = None
        self._desk: Desk | None = None
        self._error: Exception | None = None

    def __repr__(self) -> str:
        desk = f" {self._desk!r}" if self._desk is not None else ""
        return f"<AsyncEmbedder {self._state} {self.options.model!r}{desk}>"

    # --- its life ---

    async def __aenter__(self) -> AsyncEmbedder:
        """Load the model.

        Raises:
            ModelError: It cannot be loaded.
            OptionsError: An option does not go with it.
            ClosedError: It was opened before.
        """
        if self._state != "new":
            raise ClosedError("an AsyncEmbedder is opened once; make another one")
        self._loop = asyncio.get_running_loop()
        self._state = "loading"
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
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(drain=error is None)

    async def aclose(self, *, drain: bool = True) -> None:
        """Take no more requests, and end. Idempotent. Jobs on the model end with a `ClosedError`.

        Args:
            drain: Finish the requests that wait, those that still wait for room included. If False they end with a
                `ClosedError` at once; only the batches in hand run to their end.

        Cancelled while it drains, it refuses the rest, and leaves the model's thread to end by itself.
        """
        if self._driver is None:
            self._state = "closed"
            self._model_thread.executor.shutdown(wait=False)
            return
        with self._handing_over:
            if self._state in ("loading", "open"):
                self._state = "closing"
        try:
            if self._engine is not None and self._lane is not None:
                self._engine.break_lanes(_closed(), but=self._lane)
            if self._desk is not None and drain:
                await self._desk.wait_idle()
        finally:
            self._end()
        if not self._driver.done():
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._driver])

    def _end(self) -> None:
        """Let the driver come to its end."""
        if self._engine is None or self._lane is None or self._desk is None:
            if self._driver is not None:
                self._driver.cancel()
            return
        self._desk.fail_all(self._why_ended)
        self._lane.stop()
        self._engine.close()

    async def _drive(self) -> None:
        """Load the model and work until the end; whatever ends it, everyone who waits is told."""
        try:
            encoder, chunkers = await self._model_thread.run(_load, self.options)
            engine, lane = self._open(encoder, chunkers)
            self._ready.set()
            async with anyio.create_task_group() as group:
                group.start_soon(self._guard, lane.run, group.cancel_scope)
                await self._guard(engine.run, group.cancel_scope)
        except Exception as error:
            self._error = error
        finally:
            with self._handing_over:
                self._state = "broken" if self._error is not None else "closed"
            if self._engine is not None and self._desk is not None:
                if self._error is not None:
                    logger.error("the embedder has ended: %s", self._error)
                self._engine.break_lanes(self._why_ended())
                self._desk.fail_all(self._why_ended)
            self._ready.set()
            await self._model_thread.aclose()

    async def _guard(self, work: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
        """Run one half of the engine; an error of it ends the other half too."""
        try:
            await work()
        except Exception as error:
            if self._error is None:
                self._error = error
            scope.cancel()

    def _open(self, encoder: Encoder, chunkers: PromptChunkers) -> tuple[Engine, Lane]:
        options = self.options
        engine = Engine(
            encoder,
            estimator_for(encoder.device, options.token_limit),
            model_thread=self._model_thread,
            max_rows=options.batch_size,
        )
        assembler = Assembler(normalize=options.normalize_embeddings, truncate_dim=options.truncate_dim)
        lane = engine.open_lane(chunkers, assembler)
        self._desk = Desk(
            lane,
            encoder.dim,
            chunkers.chunk_size,
            options.chunk_overlap,
            max_bytes=self._max_bytes,
            cache_bytes=self._cache_bytes,
        )
        self._engine, self._lane = engine, lane
        if self._state == "loading":
            self._state = "open"
        return engine, lane

    def _why_ended(self) -> Exception:
        """A new error for each who is told."""
        if self._error is None:
            return _closed()
        broken = ModelError(f"the embedder cannot go on: {self._error}")
        broken.__cause__ = self._error
        return broken

    # --- what it says of itself ---

    @property
    def encoder(self) -> Encoder:
        """The model: its `name`, `device`, `dtype`, `dim`, `max_tokens`, ….

        Raises:
            ClosedError: It is not loaded yet.
        """
        if self._engine is None:
            raise ClosedError("the model is not loaded; enter the embedder with `async with` first")
        return self._engine.encoder

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it gives."""
        return min(self.encoder.dim, self.options.truncate_dim or self.encoder.dim)

    def statistics(self) -> EmbedderStatistics:
        """What it did, and what waits."""
        if self._engine is None or self._desk is None:
            return EmbedderStatistics(self._state, max_pending_bytes=self._max_bytes)
        engine, desk = self._engine.statistics(), self._desk
        queues = (desk.urgent.statistics(), desk.later.statistics())
        return EmbedderStatistics(
            state=self._state,
            requests=desk.n_requests,
            texts=desk.n_texts,
            pending_requests=desk.n_pending,
            waiting_texts=sum(queue.n_waiting for queue in queues),
            pending_bytes=sum(queue.reserved_bytes for queue in queues),
            max_pending_bytes=self._max_bytes,
            cache_bytes=desk.cache.n_bytes,
            cache_hits=desk.cache.n_hits,
            batches=engine.consumer.batches,
            ooms=engine.consumer.ooms,
            row_tokens=engine.consumer.row_tokens,
            padded_tokens=engine.consumer.padded_tokens,
            waiting_chunks=engine.heap.n_chunks,
            token_limit=engine.token_limit,
            model_seconds=engine.consumer.model_seconds,
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

    # --- requests ---

    @overload
    async def embed(
        self,
        texts: str,
        *,
        prompt: str | None = ...,
        prompt_name: str | None = ...,
        priority: Priority = ...,
        deadline_s: float | None = ...,
    ) -> FloatVector: ...
    @overload
    async def embed(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = ...,
        prompt_name: str | None = ...,
        priority: Priority = ...,
        deadline_s: float | None = ...,
    ) -> FloatMatrix: ...
    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> FloatVector | FloatMatrix:
        """Vectors of a text, or of several.

        Waits for room if too much is under way; more texts than fit are let in piece by piece. A text that others
        wait for already is computed once. Cancelled, what only this call wanted is dropped.

        Args:
            texts: A text, or a list of them, which may be empty.
            prompt: Put before each; wins over `prompt_name`. None takes the embedder's own.
            prompt_name: Name of one of the model's prompts.
            priority: `"interactive"` (0), `"bulk"` (10), or a whole number from 0 to 100; lower is sooner.
            deadline_s: Seconds after which it is given up.

        Returns:
            Shape `(dim,)` float32 for a text, `(n, dim)` in order for a list.

        Raises:
            TextError: A text cannot be embedded; the first of them is named.
            DeadlineError: It took longer than `deadline_s`. A `TimeoutError`.
            ClosedError: The embedder is not open, or was closed meanwhile.
            ModelError: The model or its device cannot go on.
            OptionsError: An argument cannot be.
        """
        chosen = partial(prompt_of, prompt=prompt, prompt_name=prompt_name)
        shape = _vector if isinstance(texts, str) else _matrix
        found: FloatMatrix = await self._answer(texts, chosen, priority, deadline_s, shape)
        return found

    async def embed_query(self, texts: str | Sequence[str], **how: Any) -> FloatVector | FloatMatrix:
        """`embed` with the model's own prompt for queries, as `SentenceTransformer.encode_query` chooses it."""
        return await self._embed_as(QUERY_PROMPTS, texts, **how)

    async def embed_document(self, texts: str | Sequence[str], **how: Any) -> FloatVector | FloatMatrix:
        """`embed` with the model's own prompt for documents, as `SentenceTransformer.encode_document` chooses it."""
        return await self._embed_as(DOCUMENT_PROMPTS, texts, **how)

    async def embed_records(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> list[EmbeddedText]:
        """As `embed`, but each text gives a record with its vector and `n_tokens`, or with the reason in `error`.

        Raises:
            DeadlineError: It took longer than `deadline_s`. A `TimeoutError`.
            ClosedError: The embedder is not open, or was closed meanwhile.
            ModelError: The model or its device cannot go on.
            OptionsError: An argument cannot be.
        """
        chosen = partial(prompt_of, prompt=prompt, prompt_name=prompt_name)
        texts = [texts] if isinstance(texts, str) else texts
        found: list[EmbeddedText] = await self._answer(texts, chosen, priority, deadline_s, _records)
        return found

    def embed_nowait(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        priority: Priority = "interactive",
    ) -> asyncio.Future[Any]:
        """As `embed`, but the texts are let in now or not at all: a future of the vectors. Cancel it to drop them.

        Raises:
            OverloadedError: There is no room for all of them now, or the model is still being loaded.
            ClosedError: The embedder is not open.
            ModelError: It is broken.
            OptionsError: An argument cannot be.
        """
        texts_list = check_texts(texts)
        number = priority_of(priority)
        if asyncio.get_running_loop() is not self._loop and self._loop is not None:
            raise ClosedError("embed_nowait belongs to the event loop of the embedder; embed_threadsafe is for others")
        if self._state == "loading":
            raise OverloadedError("the model is still being loaded; await embed(), which waits for it")
        self._check_open()
        shape = _vector if isinstance(texts, str) else _matrix
        request = self._request(texts_list, prompt_of(self.encoder, prompt, prompt_name), number, shape)
        desk = self._open_desk()
        desk.open(request)
        try:
            desk.admit_nowait(request)
        except BaseException:
            desk.leave(request)
            raise
        return request.future

    def embed_threadsafe(self, texts: str | Sequence[str], *, kind: Kind = "text", **how: Any) -> Future[Any]:
        """`embed` from any thread or event loop: a future of the vectors. Cancelling it cancels the work.

        Waiting for its result in the embedder's own loop would be waiting for oneself.

        Args:
            texts: A text, or a list of them.
            kind: `"query"` and `"document"` call `embed_query` and `embed_document` instead.
            **how: The keyword arguments of that method.

        Raises:
            ClosedError: The embedder is not open.
        """
        methods: dict[Kind, Callable[..., Any]] = {
            "text": self.embed,
            "query": self.embed_query,
            "document": self.embed_document,
        }
        return self._hand_over(partial(methods[kind], texts, **how))

    def is_on_its_loop(self) -> bool:
        """Whether the caller runs on the event loop that the embedder lives on, and must not block it."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _hand_over(self, call: Callable[[], Any]) -> Future[Any]:
        with self._handing_over:
            self._check_open()
            if self._loop is None:
                raise AssertionError("an open embedder has a loop: this is a bug")
            return asyncio.run_coroutine_threadsafe(call(), self._loop)

    async def _embed_as(
        self,
        names: tuple[str, ...],
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> FloatVector | FloatMatrix:
        def chosen(encoder: Encoder) -> str:
            return first_prompt_of(encoder, names) if prompt is None else prompt

        shape = _vector if isinstance(texts, str) else _matrix
        found: FloatMatrix = await self._answer(texts, chosen, priority, deadline_s, shape)
        return found

    async def _answer(
        self,
        texts: str | Sequence[str],
        prompt: Callable[[Encoder], str],
        priority: Priority,
        deadline_s: float | None,
        shape: Callable[[Request], Any],
    ) -> Any:
        chosen, number = check_texts(texts), priority_of(priority)
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            call = partial(self._answer, texts, prompt, priority, deadline_s, shape)
            return await asyncio.wrap_future(self._hand_over(call))
        if deadline_s is None:
            return await self._answer_here(chosen, prompt, number, shape)
        with anyio.move_on_after(deadline_s):
            return await self._answer_here(chosen, prompt, number, shape)
        raise DeadlineError(f"{len(chosen)} texts were not embedded within deadline_s={deadline_s}")

    async def _answer_here(
        self, texts: Sequence[str], prompt: Callable[[Encoder], str], priority: int, shape: Callable[[Request], Any]
    ) -> Any:
        if self._state != "open":
            await self._until_open()
        request = self._request(texts, prompt(self.encoder), priority, shape)
        desk = self._open_desk()
        desk.open(request)
        try:
            await desk.admit(request)
            return await request.future
        finally:
            desk.leave(request)

    def _request(self, texts: Sequence[str], prompt: str, priority: int, shape: Callable[[Request], Any]) -> Request:
        return Request(texts, prompt, priority, self.dim, keep_errors=shape is _records, shape=shape)

    def _open_desk(self) -> Desk:
        if self._desk is None:
            raise AssertionError("an open embedder has a desk: this is a bug")
        return self._desk

    async def _until_open(self) -> None:
        if self._state == "loading":
            await self._ready.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._state == "broken":
            raise self._why_ended()
        if self._state not in ("open", "loading"):
            hint = "enter it with `async with` first" if self._state == "new" else "it takes no more requests"
            raise ClosedError(f"the embedder is {'not open' if self._state == 'new' else self._state}: {hint}")


def _load(options: EmbedOptions) -> tuple[Encoder, PromptChunkers]:
    encoder = load_encoder(options)
    return encoder, PromptChunkers(encoder, options, encoder.tokenizer())


def _closed() -> AsyncEmbedError:
    return ClosedError("the embedder was closed before this was done; make the same call on an open one")


def _vector(request: Request) -> FloatVector:
    vector: FloatVector = request.vectors[0]
    return vector


def _matrix(request: Request) -> FloatMatrix:
    return request.vectors


def _records(request: Request) -> list[EmbeddedText]:
    return [
        EmbeddedText(
            id=text_id(text),
            index=index,
            key=None,
            text=text,
            embedding=None if index in request.errors else request.vectors[index],
            n_tokens=request.n_tokens[index],
            error=request.errors.get(index),
        )
        for index, text in enumerate(request.texts)
    ]
