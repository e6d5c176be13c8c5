"""The classic synchronous class: delegation only."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from tqdm import tqdm

from asyncembed.assembly import Assembler
from asyncembed.chunking import TokenCounter
from asyncembed.consumer import LimitEstimator
from asyncembed.encoders import Encoder, FloatMatrix, load_encoder
from asyncembed.errors import ClosedError, OptionsError
from asyncembed.job import JobParts, load_chunker, run_fingerprint
from asyncembed.limits import TokenLimitEstimator, initial_limit
from asyncembed.memory import MemoryBudget
from asyncembed.options import DEFAULT_SAVE_PATH, EmbedOptions
from asyncembed.records import Chunk
from asyncembed.sinks import open_writer
from asyncembed.sinks.writer import FolderWriter
from asyncembed.sources.handoff import Handoff
from asyncembed.splitting import TextSplitter, default_splitter
from asyncembed.steps import PipelineSteps
from asyncembed.stream import EmbedStream

_TO_OPTIONS = ("device", "batch_size", "normalize_embeddings", "prompt", "prompt_name", "truncate_dim")
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    # Arguments of `encode` that change nothing here, with the values that say so.
    "output_value": ("sentence_embedding",),
    "precision": ("float32",),
    "convert_to_numpy": (True, False),
    "convert_to_tensor": (False,),
    "show_progress_bar": (True, False, None),
}


class EmbeddingGenerator:
    """Embeddings without asyncio: call it with an iterator of texts.

    The iterator is pulled in the calling thread; the engine runs in a thread with an event loop of its own, so it
    works in a plain script and in a notebook whose loop is running already. Ctrl-C cancels the job, keeps what was
    finished, and is raised again.

    The result is a dictionary of lists, text → vector, or None where it could not be made. That is what the class
    has always returned and it is not small: about 12 KB a text at 384 dimensions, 12 GB for a million. For more than
    some hundred thousand texts use `embed_stream`, or read the folder with `open_embeddings`.

    The steps can also be called one by one, in the calling thread, and give the same files::

        while generator.fill_texts(iterator) or generator.n_waiting:
            chunks = generator.find_best_chunks()
            try:
                vectors = generator.embed(chunks)
            except ModelOutOfMemoryError:
                generator.fail(chunks)
            else:
                generator.succeed(chunks, vectors)
            generator.save_data()
            generator.remove_completed_texts()
        embeddings = generator.load_average_embeddings_with_fallback()

    Args:
        model: A `SentenceTransformer` (it stays where it is, on torch), a name, or a path.
        model_settings: Keyword arguments of its `encode`: `device`, `batch_size` (here the most rows of a batch),
            `normalize_embeddings`, `prompt`, `prompt_name`, `truncate_dim`, `show_progress_bar`.
        save_path: Folder of the results; None keeps them in memory only.
        max_memory_usage: Bytes that texts in flight may take; None decides from what is free.

    Attributes:
        progress_bar: A tqdm bar, advanced by each text; replace it with your own.
        max_memory_usage: Bytes that texts in flight may take.

    Raises:
        OptionsError: A setting is unknown or cannot be.
    """

    def __init__(
        self,
        model: Any,
        model_settings: Mapping[str, Any] | None = None,
        save_path: str | os.PathLike[str] | None = DEFAULT_SAVE_PATH,
        max_memory_usage: int | str | None = None,
    ) -> None:
        settings = dict(model_settings or {})
        _check_settings(settings)
        chosen = {name: settings[name] for name in _TO_OPTIONS if settings.get(name) is not None}
        self._options = EmbedOptions.from_kwargs(
            model=model, save_path=save_path, max_memory_usage=max_memory_usage, **chosen
        )
        self.max_memory_usage = MemoryBudget(self._options.max_memory_bytes).max_bytes
        self.progress_bar = tqdm(unit=" texts", disable=not settings.get("show_progress_bar"), delay=0.1)
        self._loaded: Encoder | None = None
        self._token_counter: Callable[[str], int] | None = None
        self._splitter: TextSplitter | None = None
        self._splitter_is_ours = True
        self._estimator: LimitEstimator | None = None
        self._steps: PipelineSteps | None = None
        self._writer: FolderWriter | None = None

    def __repr__(self) -> str:
        return f"<EmbeddingGenerator model={self._options.model!r} save_path={self._options.save_path!r}>"

    # --- what a script may read and replace ---------------------------------------------------------------------

    @property
    def token_counter(self) -> Callable[[str], int]:
        """Text → tokens, without special tokens; for the `length_function` of a splitter. Loads the model."""
        if self._token_counter is None:
            self._token_counter = TokenCounter(self._encoder().tokenizer())
        return self._token_counter

    @token_counter.setter
    def token_counter(self, counter: Callable[[str], int]) -> None:
        self._token_counter = counter
        if self._splitter_is_ours:
            self._splitter = None

    @property
    def text_splitter(self) -> TextSplitter:
        """The splitter of long texts: any LangChain text splitter. Reading it loads the model."""
        if self._splitter is None:
            room = load_chunker(self._encoder(), self._options).chunk_size
            self._splitter = default_splitter(self.token_counter, room, self._options.chunk_overlap)
        return self._splitter

    @text_splitter.setter
    def text_splitter(self, splitter: TextSplitter) -> None:
        self._splitter, self._splitter_is_ours = splitter, False

    @property
    def limit_estimator(self) -> LimitEstimator:
        """The limit of a batch in padded tokens: a `TokenLimitEstimator` or your own. Reading it loads the model."""
        if self._estimator is None:
            self._estimator = TokenLimitEstimator(initial_limit(self._encoder().device))
        return self._estimator

    @limit_estimator.setter
    def limit_estimator(self, estimator: LimitEstimator) -> None:
        self._estimator = estimator

    # --- the whole job ------------------------------------------------------------------------------------------

    def __call__(self, texts: Iterable[str]) -> dict[str, list[float] | None]:
        """Embed all texts.

        Returns:
            Text → vector as a list of `dim` floats, in the order of the input; None where it could not be made.

        Raises:
            AsyncEmbedError: Every text failed, or the job could not go on.
            Exception: What the iterator raised, after all texts before it were saved.
        """
        self.close()
        handoff = Handoff()
        job = _LoopThread(self._stream(handoff), handoff)
        try:
            try:
                for item in texts:
                    if not handoff.put(item):
                        break
                handoff.finish()
            except Exception as error:  # the iterator's own: the texts before it are finished first
                handoff.finish(error)
            return job.result()
        except BaseException:
            job.cancel()
            raise

    # --- step by step -------------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        """Texts taken and not yet removed as completed."""
        return self._steps.n_open if self._steps is not None else 0

    def fill_texts(self, iterator: Iterator[str]) -> int:
        """Take texts from the iterator while there is room: how many. The first call locks the folder."""
        return self._pipeline().fill(iterator)

    def find_best_chunks(self) -> list[Chunk]:
        """The chunks that should run next, together; none if nothing waits."""
        return self._pipeline().next_chunks()

    def embed(self, chunks: Sequence[Chunk]) -> FloatMatrix:
        """Their vectors, shape `(len(chunks), dim)` float32.

        Raises:
            ModelOutOfMemoryError: They do not fit into memory together: call `fail`.
        """
        return self._pipeline().embed(chunks)

    def succeed(self, chunks: Sequence[Chunk], vectors: FloatMatrix) -> None:
        """Hand in the vectors of chunks."""
        self._pipeline().succeed(chunks, vectors)

    def fail(self, chunks: Sequence[Chunk]) -> None:
        """The chunks did not fit into memory: the limit falls and they wait again; one alone fails its text."""
        self._pipeline().fail(chunks)

    def save_data(self) -> int:
        """Write the files of finished texts: how many."""
        return self._pipeline().save()

    def remove_completed_texts(self) -> int:
        """Give the memory of saved texts back: how many."""
        removed = self._pipeline().remove_completed()
        self.progress_bar.update(removed)
        return removed

    def load_average_embeddings_with_fallback(self) -> dict[str, list[float] | None]:
        """All texts given to `fill_texts` with their vectors, read back from the folder; None where there is none.

        Completes the folder's index and releases its lock.
        """
        found = self._pipeline().load()
        self.close()
        return found

    def close(self) -> None:
        """End a run by steps: complete the folder's index and release its lock. Idempotent."""
        writer, self._writer, self._steps = self._writer, None, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> EmbeddingGenerator:
        """For `with`: the folder is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- delegation ---------------------------------------------------------------------------------------------

    def _encoder(self) -> Encoder:
        if self._loaded is None:
            self._loaded = load_encoder(self._options)
        return self._loaded

    def _chosen_splitter(self) -> TextSplitter | None:
        own_counter = self._token_counter is not None and not isinstance(self._token_counter, TokenCounter)
        return self.text_splitter if own_counter or not self._splitter_is_ours else None

    def _run_options(self) -> EmbedOptions:
        return replace(self._options, max_memory_usage=self.max_memory_usage)

    def _stream(self, source: Iterable[Any]) -> EmbedStream:
        options = self._run_options()
        if self._loaded is not None:
            options = replace(options, model=self._loaded, prompt_name=None)
        before = self.progress_bar.n

        def advance() -> None:
            self.progress_bar.update(before + stream.n_texts - self.progress_bar.n)

        parts = JobParts(splitter=self._chosen_splitter(), estimator=self._estimator, on_progress=advance)
        stream = EmbedStream(source, options, parts)
        return stream

    def _pipeline(self) -> PipelineSteps:
        if self._steps is None:
            options, encoder = self._run_options(), self._encoder()
            chunker = load_chunker(encoder, options, splitter=self._chosen_splitter())
            if options.folder is not None:
                fingerprint = run_fingerprint(encoder, chunker, options)
                self._writer = open_writer(options.folder, fingerprint, encoder.made_with())
            self._steps = PipelineSteps(
                encoder,
                chunker,
                self.limit_estimator,
                Assembler(normalize=options.normalize_embeddings, truncate_dim=options.truncate_dim),
                max_bytes=self.max_memory_usage,
                max_rows=options.batch_size,
                writer=self._writer,
            )
        return self._steps


class _LoopThread:
    """A stream awaited by an event loop in a thread of its own, so that the caller's loop, if any, is left alone."""

    def __init__(self, stream: EmbedStream, handoff: Handoff) -> None:
        self._stream = stream
        self._handoff = handoff
        self._future: Future[dict[str, list[float] | None]] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="asyncembed-generator", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, list[float] | None]:
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


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name in _ONLY_VALUE:
            if value not in _ONLY_VALUE[name]:
                allowed = " or ".join(map(repr, _ONLY_VALUE[name]))
                raise OptionsError(f"model_settings: {name}={value!r} is not supported here, only {allowed}")
        elif name not in _TO_OPTIONS:
            raise OptionsError(
                f"model_settings: unknown setting {name!r}; there are {', '.join([*_TO_OPTIONS, *_ONLY_VALUE])}"
            )
