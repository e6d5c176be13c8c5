"""The job as users see it: awaitable, async-iterable, and an async context manager."""

from __future__ import annotations

import asyncio
import logging
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import anyio
import anyio.lowlevel

from asyncembed.engine.engine import EngineHost
from asyncembed.errors import ClosedError, OptionsError, TextsFailedError
from asyncembed.iterables import check_source
from asyncembed.job import Job, JobParts
from asyncembed.options import (
    DEFAULT_MODEL,
    DEFAULT_SAVE_PATH,
    FILE_OPTIONS,
    MODEL_OPTIONS,
    REQUEST_OPTIONS,
    EmbedOptions,
)
from asyncembed.records import EmbeddedText, FloatVector, Summary
from asyncembed.sources.feed import Source
from asyncembed.store.files import StorePaths
from asyncembed.wording import plural

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("asyncembed")


def embed_stream(
    texts: Iterable[Any] | AsyncIterable[Any],
    *,
    model: Any = DEFAULT_MODEL,
    save_path: Any = DEFAULT_SAVE_PATH,
    embedder: EngineHost | None = None,
    **options: Any,
) -> EmbedStream:
    """Embed a stream of texts.

    Await it for a dictionary of vectors, iterate it with `async for` for records as they finish, or use it with
    `async with` to be sure when it is closed. Nothing happens before that.

    Args:
        texts: Any iterable or async iterable of `str` or `Text`, possibly endless, possibly blocking: a synchronous
            one is pulled in a thread of its own.
        model: A name, a path, a `SentenceTransformer`, or an `Encoder`.
        save_path: Folder of one JSON file a text; texts it holds already are not computed again. None writes
            nothing.
        embedder: An open `AsyncEmbedder`, whose model is used as well: its requests go first. The options about the
            model are its own then, and so are those about chunks, prompt, task and vectors that are not named here.
        **options: The other options of `EmbedOptions`.

    Returns:
        The job, not yet started.

    Raises:
        OptionsError: An option is unknown or cannot be, `texts` cannot be a source of texts (such as a
            single `str`, a mapping or a data frame), or an option
            about the model differs from the embedder's.
    """
    for name in FILE_OPTIONS:
        if name in options:
            raise OptionsError(f"{name} is about reading a file: pass it to read_texts, and its result to embed_stream")
    if embedder is not None:
        if not hasattr(embedder, "engine"):
            raise OptionsError(f"embedder={embedder!r} must be an open AsyncEmbedder")
        model, options = _options_beside(embedder.options, model, options)
    chosen = EmbedOptions.from_kwargs(model=model, save_path=save_path, **options)
    check_source(texts)
    return EmbedStream(texts, chosen, JobParts(host=embedder))


def _options_beside(theirs: EmbedOptions, model: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Model and options of a job on another's model: those about the model must be the other's, or left out."""
    if model is not theirs.model and model not in (DEFAULT_MODEL, theirs.model):
        raise OptionsError(f"model={model!r} is not the embedder's, which is {theirs.model!r}; leave it out")
    fixed = {name: getattr(theirs, name) for name in MODEL_OPTIONS}
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise OptionsError(
                f"{name}={options[name]!r} is not the embedder's, which is {value!r}: one model serves both"
            )
    inherited = {name: getattr(theirs, name) for name in REQUEST_OPTIONS}
    if "prompt" in options or "prompt_name" in options:
        del inherited["prompt"], inherited["prompt_name"]
    return theirs.model, {**inherited, **options, **fixed}


TURNS_TO_CLOSE = 3
"""Turns of the loop after which a stream whose `async for` was left by `break` has begun to close: the loop is told
that the iterator is gone, makes a task of its end, and runs it."""

_running: dict[int, weakref.ref[EmbedStream]] = {}
"""The streams of this process whose job has begun and not ended. Jobs run in many threads; each step of a plain dict is
whole in all of them."""


class EmbedStream:
    """One job, used once: awaited, iterated, run, or entered.

    - `await stream` → `dict[str, numpy.ndarray | None]`, text → `(dim,)` float32; None where it failed.
    - `async for record in stream` → `EmbeddedText` as each finishes, in bounded memory: a slow reader slows the
      source. Every text of the input gives exactly one record.
    - `await stream.run()` → `Summary`: fills the folder without reading anything back.
    - `async with stream:` around any of them closes the job at the end of the block, whatever happened.

    Cancelling the task that uses it, or leaving the loop early, cancels the job: a batch in hand runs to its end in
    the model's thread, what was finished is saved, and the folder can be gone on with.
    """

    def __init__(self, texts: Source, options: EmbedOptions, parts: JobParts) -> None:
        self._texts = texts
        self._options = options
        self._parts = parts
        self._job: Job | None = None
        self._driver: asyncio.Task[None] | None = None
        self._used = False
        self._closed = False
        self._stop_requested = False
        self._root: str | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not started" if self._driver is None else "running"
        return f"<EmbedStream {state} {self._job!r}>"

    @property
    def summary(self) -> Summary:
        """The numbers of the run so far; complete when it has ended."""
        if self._job is None:
            return Summary()
        return self._job.summary if self._is_over() else self._job.measure()

    @property
    def n_texts(self) -> int:
        """Texts that have their result so far: cheap, for a progress bar."""
        return self._job.summary.texts if self._job is not None else 0

    @property
    def failures(self) -> list[EmbeddedText]:
        """Failed texts, each with its reason in `error`: the first thousand (the folder's `errors.jsonl` has all)."""
        return list(self._job.failures) if self._job is not None else []

    def stop(self) -> None:
        """End soon and cleanly: the batch in hand is finished and saved. The same call goes on from there."""
        self._stop_requested = True
        if self._job is not None:
            self._job.stop()

    def __await__(self) -> Generator[Any, None, dict[str, FloatVector | None]]:
        """All vectors by their texts, in the order of the input.

        Raises:
            AsyncEmbedError: Every text failed, or the job could not go on.
        """
        return self._collect().__await__()

    def __aiter__(self) -> AsyncGenerator[EmbeddedText, None]:
        """The records as they finish."""
        self._use()
        return self._records()

    async def run(self) -> Summary:
        """Do the whole job for its folder's sake, delivering nothing.

        Returns:
            The numbers.

        Raises:
            StoreError: The folder is locked, of another model, or cannot be written.
            ModelError: The model cannot be loaded or cannot go on.
            ClosedError: The stream was closed by another task.
        """
        self._use()
        self._start(want_results=False)
        try:
            await self._join()
        finally:
            await self.aclose()
        return self.summary

    async def __aenter__(self) -> EmbedStream:
        """Nothing starts before the stream is awaited or iterated; leaving the block closes it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what still runs and wait until tasks, threads and folder are closed. Idempotent.

        Cancelled while waiting, it leaves the job to close by itself.
        """
        driver = self._begin_closing()
        if driver is None:
            return
        if not driver.done():
            with anyio.CancelScope(shield=True):
                await asyncio.wait([driver])
        self._over(driver)

    def _begin_closing(self) -> asyncio.Task[None] | None:
        """Cancel what still runs: the task that then ends by itself, if there is one."""
        self._used = True
        driver, is_first, self._closed = self._driver, not self._closed, True
        if driver is not None and is_first:
            driver.add_done_callback(self._over)  # also when nobody waits for it
            driver.cancel()
        return driver

    def _over(self, driver: asyncio.Task[None]) -> None:
        """The job has ended after the stream was closed: nobody reads its results or its error any more."""
        if self._job is not None:
            self._job.discard()
        if not driver.cancelled() and (error := driver.exception()) is not None:
            logger.debug("the job ended in an error", exc_info=error)

    async def _collect(self) -> dict[str, FloatVector | None]:
        self._use()
        vectors: dict[int, tuple[str, FloatVector | None]] = {}
        async for record in self._records():
            if record.id:  # what is no text has no place in a dictionary of texts; `failures` has it
                vectors[record.index] = (record.text, record.embedding)
        summary, failures = self.summary, self.failures
        if summary.failed:
            reason = f"the first because {failures[0].error}"
            if summary.failed == summary.texts:
                if summary.texts == 1:
                    raise TextsFailedError(f"the text could not be embedded: {failures[0].error}")
                raise TextsFailedError(f"none of the {summary.texts} texts could be embedded, {reason}")
            logger.warning("%d of %s could not be embedded, %s", summary.failed, plural(summary.texts, "text"), reason)
        return dict(vectors[index] for index in sorted(vectors))

    async def _records(self) -> AsyncGenerator[EmbeddedText, None]:
        """Only receives from a channel: no task group or cancel scope is open across the `yield`."""
        job, may_wait = self._start(want_results=True), True
        # A loop closes an iterator that is left by `break`; nest_asyncio's does not, and then nothing can be awaited.
        is_closed_by_loop = sys.get_asyncgen_hooks().finalizer is not None
        try:
            while await job.results.wait():
                for entry, record in job.results.take():
                    job.release(entry)
                    yield record
            await self._join()
        except GeneratorExit:
            may_wait = is_closed_by_loop
            raise
        finally:
            if may_wait:
                await self.aclose()
            else:
                self._begin_closing()

    def _use(self) -> None:
        if self._used:
            raise ClosedError("an embed_stream is used once; call embed_stream again for another run")
        self._used = True

    def _start(self, *, want_results: bool) -> Job:
        self._job = Job(self._texts, self._options, replace(self._parts, want_results=want_results))
        if self._stop_requested:
            self._job.stop()
        root = StorePaths.of(self._options.folder).root if self._options.folder is not None else None
        # The one task of the stream: kept, awaited and cancelled here.
        self._driver = asyncio.get_running_loop().create_task(self._drive(self._job, root), name="asyncembed-job")
        return self._job

    async def _drive(self, job: Job, root: str | None) -> None:
        """Run the job, after those on the same folder that were left early and are closing."""
        for other in [reference() for reference in list(_running.values())]:
            if other is not None and root is not None and other._root == root:
                await other._until_closed()
        self._root = root
        _running[id(self)] = weakref.ref(self)
        try:
            await _run_unwrapped(job)
        finally:
            _running.pop(id(self), None)

    async def _until_closed(self) -> None:
        """Wait for the end of a job that is closing, or about to; at once if it is not, or runs on another loop."""
        for _ in range(TURNS_TO_CLOSE):
            if not self._closed:
                await anyio.lowlevel.checkpoint()
        driver = self._driver
        if self._closed and driver is not None and driver.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([driver])

    async def _join(self) -> None:
        """Wait for the job's end and raise what it raised."""
        if self._driver is None:
            raise AssertionError("a stream is joined before it was started: this is a bug")
        await asyncio.wait([self._driver])
        if self._driver.cancelled() and self._closed:
            raise ClosedError("the stream was closed while it was running")
        self._driver.result()

    def _is_over(self) -> bool:
        return self._driver is None or self._driver.done()


async def _run_unwrapped(job: Job) -> None:
    """Run a job; one exception leaves as itself, without a group around it."""
    try:
        await job.run()
    except BaseExceptionGroup as group:
        only = _only_error(group)
        if only is None:
            raise
        raise only from only.__cause__


def _only_error(error: BaseException) -> BaseException | None:
    """The single exception of nested groups; None if there are several."""
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error
