"""The classic synchronous class, and the keyword arguments of `encode` as options of a job."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from types import TracebackType
from typing import Any

from tqdm import tqdm

from asyncembed.encoders import Encoder, FloatMatrix, Instruction, input_of, instruction_of, tell_chunk_size
from asyncembed.engine.chunking import TextSplitter, TokenCounter, default_splitter
from asyncembed.engine.limit_memory import LimitMemory
from asyncembed.engine.memory import MemoryBudget
from asyncembed.engine.scheduler import LimitEstimator
from asyncembed.engine.work import Client
from asyncembed.errors import ClosedError, OptionsError
from asyncembed.iterables import check_source, without_line_ends
from asyncembed.job import JobParts, load_chunker, run_fingerprint
from asyncembed.job.loading import encoder_for, fingerprint_of
from asyncembed.job.lookup import LOOKED_AT, RUN_BY_US, check_folder
from asyncembed.options import DEFAULT_SAVE_PATH, EmbedOptions
from asyncembed.records import Chunk
from asyncembed.sources.feed import Handoff
from asyncembed.steps import PipelineSteps
from asyncembed.store.files import StorePaths
from asyncembed.store.writer import FolderWriter
from asyncembed.stream import EmbedStream
from asyncembed.threads import LoopThread, watch

_ACT = ("device", "batch_size", "normalize_embeddings", "prompt", "prompt_name", "truncate_dim", "task")
_CHANGE_NOTHING = (
    "convert_to_numpy",
    "convert_to_tensor",
    "show_progress_bar",
    "num_workers",
    "pool",
    "chunk_size",
)
"""What says how `encode` computes or in which container it answers, in any of its versions: taken with any value."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "output_value": ("sentence_embedding",),
    "precision": ("float32", None),
    "is_pretokenized": (False, None),
    "processing_kwargs": (None, {}),
    "modality": ("text", None),
}
"""What changes the meaning of the answer, with the values that do not."""

_TEXTS = ("sentences", "inputs")


def options_of(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that arguments of `encode` stand for.

    Raises:
        OptionsError: An argument is unknown, or its value asks for what is not made here.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise OptionsError(f"model_settings must hold arguments of `encode` by name, as a dict; it is {settings!r}")
    for name, value in settings.items():
        if name in _ONLY and not any(value is allowed or value == allowed for allowed in _ONLY[name]):
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise OptionsError(f"model_settings: {name}={value!r} is not supported here, only {allowed}")
        if name in _TEXTS and value is not None:
            raise OptionsError(f"model_settings: {name!r} are given when the generator is called")
        if name not in (*_ACT, *_CHANGE_NOTHING, *_ONLY, *_TEXTS):
            raise OptionsError(
                f"model_settings: unknown setting {name!r}; there are {', '.join([*_ACT, *_CHANGE_NOTHING, *_ONLY])}"
            )
    found = {name: settings[name] for name in _ACT if settings.get(name) is not None}
    if "device" in found:
        found["device"] = _device_of(found["device"])
    if "normalize_embeddings" in found:
        found["normalize_embeddings"] = bool(found["normalize_embeddings"])
    for name in ("batch_size", "truncate_dim"):
        if hasattr(found.get(name), "item"):  # a number of NumPy or torch
            found[name] = found[name].item()
    return found


def _device_of(device: Any) -> str:
    """A device by name, as torch's object, by the number of a GPU, or as a list of one."""
    if isinstance(device, (list, tuple)):
        if len(device) > 1:
            raise OptionsError(f"model_settings: device={device!r} names several; one runs here, so name one")
        return _device_of(device[0]) if device else "auto"
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}"
    return str(device)


_UNUSED: dict[str, Any] = {"_loaded": None, "_limits": None, "_steps": None}
"""The attributes of a generator that was not used yet."""

_of_parents: list[dict[str, Any]] = []
"""What a forked child has of its parent's generators: dropped, it would end threads and locks that are the parent's."""


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
                generator.embed(chunks)
            except Exception as error:
                generator.fail(chunks, error)
            else:
                generator.succeed(chunks)
            generator.save_data()
            generator.remove_completed_texts()
        embeddings = generator.load_average_embeddings_with_fallback()

    Args:
        model: A `SentenceTransformer` (it stays where it is, on torch), a name, or a path.
        model_settings: Keyword arguments of its `encode`. `device`, `batch_size` (here the most rows of a batch),
            `normalize_embeddings`, `prompt`, `prompt_name`, `truncate_dim`, `task` and `show_progress_bar` act; what
            only says how `encode` computes or in which container it answers (`convert_to_tensor`, `pool`, …) is taken
            and changes nothing.
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
        self._options = EmbedOptions.from_kwargs(
            model=model, save_path=save_path, max_memory_usage=max_memory_usage, **options_of(model_settings)
        )
        self.max_memory_usage = MemoryBudget(self._options.max_memory_bytes).max_bytes
        self._is_quiet = not (model_settings or {}).get("show_progress_bar")
        self.progress_bar = self._new_bar()
        self._loaded: Encoder | None = None
        self._loading = threading.Lock()  # a job loads the model while its source may ask for the tokenizer
        self._token_counter: Callable[[str], int] | None = None
        self._splitter: TextSplitter | None = None
        self._splitter_is_ours = True
        self._estimator: LimitEstimator | None = None
        self._limits: LimitMemory | None = None
        self._steps: PipelineSteps | None = None
        watch(self)

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of and what was replaced: copied or pickled, it loads its model where it is used."""
        state = {**self.__dict__, **_UNUSED}
        del state["progress_bar"], state["_loading"]
        if isinstance(self._token_counter, TokenCounter):
            state["_token_counter"] = None
        if self._splitter_is_ours:
            state["_splitter"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loading=threading.Lock())
        self.progress_bar = self._new_bar()
        watch(self)

    def orphan(self) -> None:
        """This is a child process, made by a fork: the model's threads are the parent's, so it is loaded anew."""
        _of_parents.append(dict(self.__dict__))
        self.__dict__.update(self.__getstate__(), _loading=threading.Lock())

    def __repr__(self) -> str:
        return f"<EmbeddingGenerator model={self._options.model!r} save_path={self._options.save_path!r}>"

    # --- what a script may read and replace ---------------------------------------------------------------------

    @property
    def token_counter(self) -> Callable[[str], int]:
        """Text → tokens, without special tokens; for the `length_function` of a splitter. Loads the model."""
        if self._token_counter is None:
            encoder = self._encoder()
            tokenizer, _ = input_of(encoder, instruction_of(encoder, self._options).task)
            self._token_counter = TokenCounter(tokenizer)
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
        """The limit of a batch in padded tokens: a `TokenLimitEstimator` or your own. Reading it loads the model.

        One for all runs: what it learnt in one, the next begins with; it is also remembered for other processes,
        unless it is your own.
        """
        return self._estimator if self._estimator is not None else self._kept_limits().estimator

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
        check_source(texts)
        self.close()
        handoff = Handoff()
        loop = LoopThread("asyncembed-generator")
        job = loop.submit(_vectors, self._stream(handoff))
        job.add_done_callback(lambda _: handoff.close())
        try:
            try:
                for item in without_line_ends(texts):
                    if not handoff.put(item):
                        break
                handoff.finish()
            except Exception as error:  # the iterator's own: the texts before it are finished first
                handoff.finish(error)
            return job.result()
        except CancelledError:
            raise ClosedError("the job was cancelled") from None
        except BaseException:
            job.cancel()
            raise
        finally:
            loop.close()

    # --- step by step -------------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        """Texts taken and not yet removed as completed."""
        return self._steps.n_open if self._steps is not None else 0

    def fill_texts(self, iterator: Iterator[str]) -> int:
        """Take texts from the iterator while there is room: how many. The first call locks the folder.

        Repeats, texts saved earlier and items that are no text count as well, and wait for `save_data`.
        """
        check_source(iterator)
        return self._pipeline().fill(without_line_ends(iterator))

    def find_best_chunks(self) -> list[Chunk]:
        """The chunks that should run next, together, the same until they are embedded or failed; none if none wait."""
        return self._pipeline().next_chunks()

    def embed(self, chunks: Sequence[Chunk]) -> FloatMatrix:
        """Their vectors, shape `(len(chunks), dim)` float32, recorded as those of the chunks in hand.

        Raises:
            ModelOutOfMemoryError: They do not fit into memory together: call `fail`.
            Exception: What the model raised, unchanged; one of the texts may be at fault. Call `fail` with it to
                find that one and go on with the others, or let it end the run.
        """
        return self._pipeline().embed(chunks)

    def succeed(self, chunks: Sequence[Chunk], vectors: FloatMatrix | None = None) -> None:
        """The limit of a batch learns that they ran; optional.

        Args:
            chunks: The chunks.
            vectors: Shape `(len(chunks), dim)` float32, if they were made elsewhere and not by `embed`.

        Raises:
            OptionsError: `embed` has recorded other vectors, or there are none.
        """
        self._pipeline().succeed(chunks, vectors)

    def fail(self, chunks: Sequence[Chunk], error: BaseException | None = None) -> None:
        """The chunks could not be embedded: they are tried again in halves; one alone fails its text.

        Args:
            chunks: The chunks.
            error: What `embed` raised. Out of memory, or None, lowers the limit of a batch; anything else does not,
                and is kept as the text's reason.

        Raises:
            ModelError: The error says that the device is dead, or the model, tried again on a chunk that it took
                before, fails on all.
        """
        self._pipeline().fail(chunks, error)

    def save_data(self) -> int:
        """Write what is finished, files, keys and errors: how many texts."""
        return self._pipeline().save()

    def remove_completed_texts(self) -> int:
        """Give the memory of saved texts back: how many."""
        removed = self._pipeline().remove_completed()
        self.progress_bar.update(removed)
        return removed

    def load_average_embeddings_with_fallback(self) -> dict[str, list[float] | None]:
        """All texts given to `fill_texts` with their vectors, read back from the folder; None where there is none.

        Completes the folder's index and releases its lock, whatever happens.

        Raises:
            CorruptRecordError: A file was damaged since it was written.
        """
        try:
            return self._pipeline().load()
        finally:
            self.close()

    def close(self) -> None:
        """End a run by steps: complete the folder's index and release its lock. Idempotent."""
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()
            if self._limits is not None:
                self._limits.close()

    def __enter__(self) -> EmbeddingGenerator:
        """For `with`: the folder is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_bar(self) -> tqdm[Any]:
        return tqdm(unit=" texts", disable=self._is_quiet, delay=0.1)

    # --- delegation ---------------------------------------------------------------------------------------------

    def _encoder(self, recorded: Mapping[str, Any] | None = None) -> Encoder:
        with self._loading:
            self._loaded = encoder_for(self._options, self._loaded, recorded or {})
            return self._loaded

    def _kept_limits(self) -> LimitMemory:
        encoder = self._encoder()
        if self._limits is None or self._limits.encoder is not encoder:
            self._limits = LimitMemory(encoder)
        return self._limits

    def _chosen_splitter(self) -> TextSplitter | None:
        own_counter = self._token_counter is not None and not isinstance(self._token_counter, TokenCounter)
        return self.text_splitter if own_counter or not self._splitter_is_ours else None

    def _run_options(self) -> EmbedOptions:
        return replace(self._options, max_memory_usage=self.max_memory_usage)

    def _stream(self, source: Handoff) -> EmbedStream:
        before = self.progress_bar.n

        def advance() -> None:  # called only while the job runs: `stream`, which is made of it, is there by then
            self.progress_bar.update(before + stream.n_texts - self.progress_bar.n)

        parts = JobParts(
            splitter=self._chosen_splitter(),
            estimator=self._estimator,
            load=self._encoder,
            limits=lambda _: self._kept_limits(),
            on_progress=advance,
        )
        stream = EmbedStream(source, self._run_options(), parts)
        return stream

    def _pipeline(self) -> PipelineSteps:
        if self._steps is None:
            options = self._run_options()
            writer = FolderWriter(StorePaths.of(options.folder)) if options.folder is not None else None
            try:
                self._steps = self._open_steps(options, writer)
            except BaseException:
                if writer is not None:
                    writer.close(complete=False)
                raise
        return self._steps

    def _open_steps(self, options: EmbedOptions, writer: FolderWriter | None) -> PipelineSteps:
        if writer is not None:
            writer.open()
        recorded = fingerprint_of(writer.header) if writer is not None else {}
        encoder = self._encoder(recorded)
        chunker = load_chunker(encoder, options, splitter=self._chosen_splitter(), recorded=recorded)
        tell_chunk_size(encoder, options, chunker.chunk_size)
        if writer is not None:
            writer.claim(run_fingerprint(encoder, chunker, options), encoder.made_with())
            if encoder.backend in RUN_BY_US:
                check_folder(
                    writer.paths.root, encoder, Instruction(chunker.prompt, chunker.task), writer.some(LOOKED_AT)
                )
        return PipelineSteps(
            encoder,
            chunker,
            self._estimator if self._estimator is not None else self._kept_limits(),
            Client(normalize=options.normalize_embeddings, truncate_dim=options.truncate_dim),
            max_bytes=self.max_memory_usage,
            max_rows=options.batch_size,
            writer=writer,
        )


async def _vectors(stream: EmbedStream) -> dict[str, list[float] | None]:
    vectors = await stream
    return {text: None if vector is None else vector.tolist() for text, vector in vectors.items()}
