"""The app's face of the engine: concurrent requests share batches, and jobs may share the model with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import anyio

from asyncembed.embedder.life import EmbedderLife
from asyncembed.embedder.requests import (
    CountedVectors,
    Request,
    counted_of,
    matrix_of,
    records_of,
    vector_of,
    with_faults,
)
from asyncembed.embedder.settings import (
    How,
    HowOptions,
    check_deadline,
    check_inputs,
    check_texts,
    choose_options,
    priority_of,
    sort_texts,
)
from asyncembed.encoders import FloatMatrix, Kind
from asyncembed.engine.memory import available_bytes
from asyncembed.errors import ClosedError, DeadlineError, OverloadedError
from asyncembed.options import DEFAULT_MODEL, parse_bytes
from asyncembed.records import AnyText, EmbeddedText, FloatVector
from asyncembed.wording import plural

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_PENDING_BYTES = 256 * 2**20
"""Room for some 20,000 short texts, or for as many as fit into a quarter of what is free."""


class AsyncEmbedder(EmbedderLife):
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
        for prompt in (query_prompt, document_prompt):
            How(prompt=prompt)  # refuses what is no text
        self._kind_prompts: dict[Kind, str | None] = {"query": query_prompt, "document": document_prompt}
        if max_pending_bytes is None:
            n_bytes = max(1, min(DEFAULT_PENDING_BYTES, available_bytes() // 4))
        else:
            n_bytes = parse_bytes(max_pending_bytes)
        super().__init__(
            choose_options(model, options),
            max_pending_bytes=n_bytes,
            cache_bytes=parse_bytes(cache_bytes) if cache_bytes != 0 else 0,
        )

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
        shape = vector_of if isinstance(texts, str) else matrix_of
        found: FloatMatrix = await self._answer(texts, How.of(how), deadline_s, shape)
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
        """As `embed`, but each text gives a record with its vector and `n_tokens`, or with the reason in `error`.

        So does an item that is no text. The keyword arguments are those of `embed`.

        Raises:
            TextTypeError: `texts` is no list.
            DeadlineError: It took longer than `deadline_s`. A `TimeoutError`.
            ClosedError: The embedder is not open, or was closed meanwhile.
            ModelError: The model or its device cannot go on.
            OptionsError: An argument cannot be.
        """
        good, faults = sort_texts(texts)
        found: list[EmbeddedText] = await self._answer(good, How.of(how), deadline_s, records_of)
        return with_faults(found, faults) if faults else found

    def embed_nowait(self, texts: str | Sequence[str], **how: Unpack[HowOptions]) -> asyncio.Future[Any]:
        """As `embed`, but the texts are let in now or not at all: a future of the vectors. Cancel it to drop them.

        The keyword arguments are those of `embed`, without `deadline_s`.

        Raises:
            OverloadedError: There is no room for all of them now, or the model is still being loaded.
            ClosedError: The embedder is not open.
            ModelError: It is broken.
            OptionsError: An argument cannot be.
        """
        shape = vector_of if isinstance(texts, str) else matrix_of
        return self._admit_now(check_texts(texts), How.of(how), shape)

    def embed_counted_nowait(
        self, texts: Sequence[AnyText], **how: Unpack[HowOptions]
    ) -> asyncio.Future[CountedVectors]:
        """As `embed_nowait` of a list, with the tokens of each text; a text may also be given as token ids.

        Args:
            texts: Each a `str`, or a `TokenText`: ids of the model's own vocabulary, with or without its special
                tokens around them. An id that is not in it fails the text.
            **how: The keyword arguments of `embed`, without `deadline_s`.

        Raises:
            OverloadedError: There is no room for all of them now, or the model is still being loaded.
            ClosedError: The embedder is not open.
            ModelError: It is broken.
            OptionsError: An argument cannot be.
        """
        return self._admit_now(check_inputs(texts), How.of(how), counted_of)

    def _admit_now(self, texts: Sequence[AnyText], how: How, shape: Callable[[Request], Any]) -> asyncio.Future[Any]:
        self._check_open()
        if asyncio.get_running_loop() is not self._loop and self._loop is not None:
            raise ClosedError("embed_nowait belongs to the event loop of the embedder; embed_threadsafe is for others")
        if self._state == "loading":
            raise OverloadedError("the model is still being loaded; await embed(), which waits for it")
        request = self._request(texts, how, shape)
        requests = self._open_requests()
        requests.open(request)
        try:
            requests.admit_nowait(request)
        except BaseException:
            requests.leave(request)
            raise
        return request.future

    def embed_threadsafe(self, texts: str | Sequence[str], **how: Any) -> Future[Any]:
        """`embed` from any thread or event loop: a future of the vectors. Cancelling it cancels the work.

        Waiting for its result in the embedder's own loop would be waiting for oneself.

        Args:
            texts: A text, or a list of them.
            **how: The keyword arguments of `embed`.

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

    def _hand_over(self, call: Callable[[], Any]) -> Future[Any]:
        with self._handing_over:
            self._check_open()
            if self._loop is None:
                raise AssertionError("an open embedder has a loop: this is a bug")
            return asyncio.run_coroutine_threadsafe(call(), self._loop)

    async def _answer(
        self, texts: str | Sequence[str], how: How, deadline_s: float | None, shape: Callable[[Request], Any]
    ) -> Any:
        chosen = check_texts(texts)
        check_deadline(deadline_s)
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            call = partial(self._answer, chosen, how, deadline_s, shape)
            return await asyncio.wrap_future(self._hand_over(call))
        if deadline_s is None:
            return await self._answer_here(chosen, how, shape)
        with anyio.move_on_after(deadline_s):
            return await self._answer_here(chosen, how, shape)
        raise DeadlineError(f"{plural(len(chosen), 'text')} not embedded within deadline_s={deadline_s}")

    async def _answer_here(self, texts: Sequence[str], how: How, shape: Callable[[Request], Any]) -> Any:
        if self._state != "open":
            await self._until_open()
        request = self._request(texts, how, shape)
        requests = self._open_requests()
        requests.open(request)
        try:
            await requests.admit(request)
            return await request.future
        finally:
            requests.leave(request)

    def _request(self, texts: Sequence[AnyText], how: How, shape: Callable[[Request], Any]) -> Request:
        return Request(
            texts,
            how.instruction(self.encoder, self.options, self._kind_prompts),
            priority_of(how.priority),
            self.dim,
            takes_blanks=how.blanks == "encode",
            keep_errors=shape is records_of,
            shape=shape,
        )
