"""The app's face of the engine: one model, loaded, shared by concurrent requests and by jobs, and closed."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import anyio

from asyncembed.embedder.requests import CountedVectors, HowOptions, Request, Requests, check_how
from asyncembed.encoders import Encoder, FloatMatrix, Kind, load_encoder, tell_chunk_size
from asyncembed.engine.chunkers import InstructionChunkers
from asyncembed.engine.engine import EncoderThread, Engine
from asyncembed.engine.limit_memory import LimitMemory
from asyncembed.engine.memory import available_bytes
from asyncembed.errors import ClosedError, DeadlineError, ModelError, OptionsError, OverloadedError
from asyncembed.options import DEFAULT_MODEL, MODEL_OPTIONS, REQUEST_OPTIONS, EmbedOptions, parse_bytes
from asyncembed.records import AnyText, EmbeddedText, FloatVector
from asyncembed.threads import WorkerThread, watch
from asyncembed.wording import plural

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup
if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("asyncembed")

DEFAULT_PENDING_BYTES = 256 * 2**20
"""Room for some 20,000 short texts, or for as many as fit into a quarter of what is free."""

State = Literal["new", "loading", "open", "closing", "closed", "broken"]


class EmbedderStatistics(NamedTuple):
    """What an embedder did, and what waits in it."""

    state: State
    requests: int = 0  # calls so far
    texts: int = 0  # texts of these calls that were let in
    pending_requests: int = 0  # calls without an answer
    waiting_texts: int = 0  # texts that wait for room
    pending_bytes: int = 0  # what the texts under way have reserved
    max_pending_bytes: int = 0  # what they may reserve
    cache_bytes: int = 0  # what the cache holds
    cache_hits: int = 0  # texts answered from it
    truncations: int = 0  # texts that were computed without their end, by `long_texts="truncate"`
    batches: int = 0  # batches that ran, those of jobs on the same model included, as in all that follows
    ooms: int = 0  # batches that ran out of memory and were run again in parts
    row_tokens: int = 0  # tokens of all rows, without padding
    padded_tokens: int = 0  # tokens of all batches, with padding
    waiting_chunks: int = 0  # chunks that wait for the model
    token_limit: int = 0  # the present limit of a batch in padded tokens
    model_seconds: float = 0.0  # how long batches took, added up


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
        query_prompt: Put before queries, whatever prompts the model has; None takes the model's own for queries, or, if
            that is empty, `prompt` or `prompt_name`.
        document_prompt: The same for documents.
        **options: Options of `EmbedOptions` about model, chunks and vectors: `device`, `backend`, `dtype`,
            `batch_size`, `token_limit`, `chunk_size`, `chunk_overlap`, `long_texts`, `prompt`, `prompt_name`, `task`,
            `normalize_embeddings`, `truncate_dim`, `trust_remote_code`, `allow_pickle`.

    Raises:
        OptionsError: An option is unknown, cannot be, or has no meaning here.
    """

    def __init__(
        self,
        model: Any = DEFAULT_MODEL,
        *,
        max_pending_bytes: int | str | None = None,
        cache_bytes: int | str = 0,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        **options: Any,
    ) -> None:
        allowed = (*MODEL_OPTIONS, *REQUEST_OPTIONS)
        for name in options:
            if name not in allowed:
                raise OptionsError(f"{name!r} is no option of an AsyncEmbedder; there are {', '.join(allowed)}")
        for prompt in (query_prompt, document_prompt):
            check_how({"prompt": prompt})
        self.options = EmbedOptions.from_kwargs(model=model, save_path=None, **options)
        self._kind_prompts: dict[Kind, str | None] = {"query": query_prompt, "document": document_prompt}
        if max_pending_bytes is None:
            max_pending_bytes = max(1, min(DEFAULT_PENDING_BYTES, available_bytes() // 4))
        self._max_bytes = parse_bytes(max_pending_bytes)
        self._cache_bytes = parse_bytes(cache_bytes) if cache_bytes != 0 else 0
        self._model_thread = WorkerThread("asyncembed-model")
        self._ready = asyncio.Event()
        self._handing_over = threading.Lock()
        self._state: State = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: asyncio.Task[None] | None = None
        self._requests: Requests | None = None
        self._error: Exception | None = None
        self._is_orphan = False

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an AsyncEmbedder cannot be copied or pickled: make one of the same model where it is needed")

    def __repr__(self) -> str:
        requests = f" {self._requests!r}" if self._requests is not None else ""
        return f"<AsyncEmbedder {self._state} {self.options.model!r}{requests}>"

    @overload
    async def embed(self, texts: str, *, deadline_s: float | None = ..., **how: Unpack[HowOptions]) -> FloatVector: ...
    @overload
    async def embed(
        self, texts: Sequence[str], *, deadline_s: float | None = ..., **how: Unpack[HowOptions]
    ) -> FloatMatrix: ...
    async def embed(
        self, texts: str | Sequence[str], *, deadline_s: float | None = None, **how: Unpack[HowOptions]
    ) -> FloatVector | FloatMatrix:
        """Vectors of a text, or of several.

        Waits for room if too much is under way; more texts than fit are let in piece by piece. A text that others
        wait for already is computed once. Cancelled, what only this call wanted is dropped.

        Args:
            texts: A text, or a list of them, which may be empty; any other iterable that has an order will do.
            kind: `"query"` and `"document"` take the model's own prompt of that kind and its route of that name, as
                `encode_query` and `encode_document` of a `SentenceTransformer` do; `"text"` neither. Where the model's
                prompt is empty, one that the embedder was given explicitly holds.
            prompt: Put before each; wins over `prompt_name`. None takes the embedder's own.
            prompt_name: Name of one of the model's prompts.
            task: Which of its routes or adapters the model takes. None takes that of `kind`, or the embedder's own.
            blanks: What becomes of a text without tokens, such as a blank one: an `"error"`, or `"encode"` gives it the
                vector that the model's `encode` gives it.
            priority: `"interactive"` (0), `"bulk"` (10), or a whole number from 0 to 100; lower is sooner.
            deadline_s: Seconds after which it is given up.

        Returns:
            Shape `(dim,)` float32 for a text, `(n, dim)` in order for a list.

        Raises:
            TextError: A text cannot be embedded; the first of them is named.
            TextTypeError: `texts` is neither a text nor a list of texts. A `TypeError`.
            DeadlineError: It took longer than `deadline_s`. A `TimeoutError`.
            ClosedError: The embedder is not open, or was closed meanwhile.
            ModelError: The model or its device cannot go on.
            OptionsError: An argument cannot be.
        """
        found: FloatMatrix = await self._answer(Request(texts, how), deadline_s)
        return found

    async def embed_query(self, texts: str | Sequence[str], **how: Any) -> FloatVector | FloatMatrix:
        """`embed` with `kind="query"`: with the model's own prompt and route for queries."""
        return await self.embed(texts, kind="query", **how)

    async def embed_document(self, texts: str | Sequence[str], **how: Any) -> FloatVector | FloatMatrix:
        """`embed` with `kind="document"`: with the model's own prompt and route for documents."""
        return await self.embed(texts, kind="document", **how)

    async def embed_records(
        self, texts: Sequence[str], *, deadline_s: float | None = None, **how: Unpack[HowOptions]
    ) -> list[EmbeddedText]:
        """As `embed` of a list, but each item gives a record with its vector and `n_tokens`, or the reason in `error`.

        Raises:
            TextTypeError: `texts` is no list; an item that is no text has a record like any other.
            DeadlineError: As `embed`; so are `ClosedError`, `ModelError` and `OptionsError`.
        """
        found: list[EmbeddedText] = await self._answer(Request(texts, how, "records"), deadline_s)
        return found

    def embed_nowait(self, texts: str | Sequence[str], **how: Unpack[HowOptions]) -> asyncio.Future[Any]:
        """As `embed`, but the texts are let in now or not at all: a future of the vectors. Cancel it to drop them.

        The keyword arguments are those of `embed`, without `deadline_s`.

        Raises:
            OverloadedError: There is no room for all of them now, or the model is still being loaded.
            ClosedError: The embedder is not open, or on another event loop.
            ModelError: It is broken.
            OptionsError: An argument cannot be.
        """
        return self._admit_now(Request(texts, how))

    def embed_counted_nowait(
        self, texts: Sequence[AnyText], **how: Unpack[HowOptions]
    ) -> asyncio.Future[CountedVectors]:
        """As `embed_nowait` of a list, with the tokens of each text; a text may also be given as token ids.

        Args:
            texts: Each a `str`, or a `TokenText`: ids of the model's own vocabulary, with or without its special
                tokens around them. An id that is not in it fails the text.
            **how: The keyword arguments of `embed_nowait`, whose errors these are too.
        """
        return self._admit_now(Request(texts, how, "counted"))

    def embed_threadsafe(self, texts: str | Sequence[str], **how: Any) -> Future[Any]:
        """`embed` from any thread or event loop: a future of the vectors. Cancelling it cancels the work.

        Waiting for its result in the embedder's own loop would be waiting for oneself.

        Raises:
            ClosedError: The embedder is not open.
        """
        return self._hand_over(partial(self.embed, texts, **how))

    def is_on_its_loop(self) -> bool:
        """Whether the caller runs on the event loop that the embedder lives on, and must not block it."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _admit_now(self, request: Request) -> asyncio.Future[Any]:
        self._check_open()
        if not self.is_on_its_loop():
            raise ClosedError("embed_nowait belongs to the event loop of the embedder; embed_threadsafe is for others")
        if self._requests is None:
            raise OverloadedError("the model is still being loaded; await embed(), which waits for it")
        return self._requests.ask_nowait(request)

    async def _answer(self, request: Request, deadline_s: object) -> Any:
        if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float | None) or deadline_s != deadline_s:
            raise OptionsError(f"deadline_s={deadline_s!r} must be a number of seconds, or None")
        if self._loop is not None and not self.is_on_its_loop():
            return await asyncio.wrap_future(self._hand_over(partial(self._answer, request, deadline_s)))
        with anyio.move_on_after(deadline_s):
            return await (await self._opened()).ask(request)
        raise DeadlineError(f"{plural(len(request.texts), 'text')} not embedded within deadline_s={deadline_s}")

    def _hand_over(self, call: Callable[[], Any]) -> Future[Any]:
        with self._handing_over:
            self._check_open()
            if self._loop is None:
                raise AssertionError("an open embedder has a loop: this is a bug")
            return asyncio.run_coroutine_threadsafe(call(), self._loop)

    @property
    def encoder(self) -> Encoder:
        """The model: its `name`, `device`, `dtype`, `dim`, `max_tokens`, ….

        Raises:
            ClosedError: It is not loaded yet, or was closed before it was.
            ModelError: It could not be loaded.
        """
        return self._loaded().engine.encoder

    @property
    def dim(self) -> int:
        """Dimensions of the vectors it gives."""
        return self._loaded().dim

    def statistics(self) -> EmbedderStatistics:
        """What it did, and what waits."""
        requests = self._requests
        if requests is None:
            return EmbedderStatistics(self._state, max_pending_bytes=self._max_bytes)
        engine = requests.engine
        queues = (requests.urgent.statistics(), requests.later.statistics())
        return EmbedderStatistics(
            state=self._state,
            requests=requests.n_requests,
            texts=requests.n_texts,
            pending_requests=len(requests),
            waiting_texts=sum(queue.n_waiting for queue in queues),
            pending_bytes=sum(queue.reserved_bytes for queue in queues),
            max_pending_bytes=self._max_bytes,
            cache_bytes=requests.cache.n_bytes,
            cache_hits=requests.cache.n_hits,
            truncations=requests.client.truncated_texts,
            waiting_chunks=len(engine.scheduler.heap),
            token_limit=engine.token_limit,
            **asdict(engine.statistics),
        )

    async def engine(self) -> Engine:
        """The engine, for a job on the same model; waits while the model is being loaded.

        Raises:
            ClosedError: The embedder is not open.
            ModelError: It is broken.
        """
        return (await self._opened()).engine

    async def _opened(self) -> Requests:
        if self._state == "loading":
            await self._ready.wait()
        self._check_open()
        return self._loaded()

    def _loaded(self) -> Requests:
        if self._requests is None:
            self._check_open()
            raise ClosedError("the model is not loaded yet; enter the embedder with `async with` first")
        return self._requests

    def _check_open(self) -> None:
        if self._is_orphan:
            raise ClosedError("the embedder was opened before a fork, in the parent process: open one in this process")
        if self._state == "broken":
            raise self._why_ended()
        if self._state not in ("open", "loading"):
            hint = "enter it with `async with` first" if self._state == "new" else "it takes no more requests"
            raise ClosedError(f"the embedder is {'not open' if self._state == 'new' else self._state}: {hint}")

    def _why_ended(self) -> Exception:
        """A new error for each who is told."""
        if self._error is None:
            return ClosedError("the embedder was closed before this was done; make the same call on an open one")
        broken = ModelError(f"the embedder cannot go on: {self._error}")
        broken.__cause__ = self._error
        return broken

    async def __aenter__(self) -> AsyncEmbedder:
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

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.aclose(drain=kind is None)

    async def aclose(self, *, drain: bool = True) -> None:
        """Take no more requests, and end. Idempotent. Jobs on the model end with a `ClosedError`.

        Cancelled while it drains, it refuses the rest with a `ClosedError`, and leaves the model's thread to end by
        itself.
        """
        driver, requests = self._driver, self._requests
        if driver is None:
            self._state = "closed"
            return
        if asyncio.get_running_loop() is not (loop := driver.get_loop()):
            if not loop.is_closed():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.aclose(drain=drain), loop))
            return
        with self._handing_over:
            if self._state in ("loading", "open"):
                self._state = "closing"
        if requests is None:
            driver.cancel()
        else:
            try:
                requests.engine.break_clients(self._why_ended(), but=requests.client)
                if drain:
                    await requests.wait_idle()
            finally:
                requests.fail_all(self._why_ended)
                requests.client.stop()
                requests.engine.close()
        if not driver.done():
            with anyio.CancelScope(shield=True):
                await asyncio.wait([driver])

    async def _drive(self) -> None:
        """Load the model and work until the end; whatever ends it, everyone who waits is told."""
        close: Callable[[], None] | None = None
        try:
            limits, chunkers = await self._model_thread.run(_load, self.options)
            close = limits.close
            thread, max_rows = self._model_thread, self.options.batch_size
            encoder = EncoderThread(limits.encoder, limits.estimator, thread=thread, max_rows=max_rows, memory=limits)
            sizes = (self._max_bytes, self._cache_bytes)
            requests = Requests(
                Engine(encoder, is_interactive=True), chunkers, self.options, self._kind_prompts, *sizes
            )
            self._requests = requests
            self._state = "open"
            self._ready.set()
            async with anyio.create_task_group() as group:
                group.start_soon(requests.client.run)
                group.start_soon(requests.run)
                await requests.engine.run()
        except Exception as error:
            self._error = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        finally:
            with self._handing_over:
                self._state = "broken" if self._error is not None else "closed"
            if self._requests is not None:
                if self._error is not None:
                    logger.error("the embedder has ended: %s", self._error)
                self._requests.engine.break_clients(self._why_ended())
                self._requests.fail_all(self._why_ended)
            self._ready.set()
            await self._model_thread.aclose(close)

    def orphan(self) -> None:
        """This is a child process, made by a fork: the model's thread and the event loop are the parent's."""
        self._handing_over = threading.Lock()  # whoever held it in the parent is not here to give it back
        self._is_orphan, self._state, self._driver, self._requests = True, "closed", None, None


def _load(options: EmbedOptions) -> tuple[LimitMemory, InstructionChunkers]:
    encoder = load_encoder(options)
    chunkers = InstructionChunkers(encoder, options)
    tell_chunk_size(encoder, options, chunkers.chunk_size)
    return LimitMemory(encoder, options.token_limit), chunkers
