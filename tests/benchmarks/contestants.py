"""The contestants, as they run inside their own process: `encode`, the whole job, and the bare loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from asyncembed import Batch, Chunk, EmbedOptions, EmbedStream, load_encoder, read_texts
from asyncembed.encoders import Encoder
from asyncembed.encoders.loading import model_folder
from asyncembed.job import JobParts
from tests.benchmarks import corpora
from tests.benchmarks.measure import Stopwatch, Turn, rss_bytes

T = TypeVar("T")

Rows = list[list[npt.NDArray[np.int32]]]
"""Batches as rows of token ids."""


class FixedLimit:
    """A token limit that learns nothing, for a sweep."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def __call__(self) -> int:
        """The limit."""
        return self._limit

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """Nothing."""

    def fail(self, n_tokens: int) -> None:
        """A sweep measures what fits."""
        raise RuntimeError(f"{n_tokens} padded tokens do not fit into memory; sweep lower limits")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a process loads.

    Attributes:
        model: A name or a folder.
        device: Where it runs.
        backend: `encode` for `SentenceTransformer.encode`, else the backend of the job.
        dtype: The precision of the job.
    """

    model: str
    device: str
    backend: str
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The contestant's name; every other name begins with another word."""
        return "encode" if self.backend == "encode" else f"asyncembed {self.backend} {self.dtype}"

    @property
    def turns(self) -> list[str]:
        """The names of what it is measured in."""
        return [self.name] if self.backend == "encode" else [self.name, self.name.replace("asyncembed", "bare loop")]


class EncodeContestant:
    """`SentenceTransformer.encode` at its defaults over the list of texts."""

    def __init__(self, plan: Plan, work: Path) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        folder = model_folder(plan.model)
        self._model: Any = SentenceTransformer(str(folder or plan.model), device=plan.device)
        self.loaded_bytes = rss_bytes()
        self._padding: dict[Path, tuple[float, int]] = {}

    def encoder(self) -> Encoder:
        """The same model behind the protocol, to count tokens with."""
        return load_encoder(EmbedOptions(model=self._model))

    def warm_up(self, corpus: Path) -> None:
        """Run it all once, and look at what the model is given."""
        useful = padded = batches = 0

        def look(module: Any, arguments: tuple[Any, ...]) -> None:
            nonlocal useful, padded, batches
            mask = arguments[0]["attention_mask"]
            useful, padded, batches = useful + int(mask.sum()), padded + mask.numel(), batches + 1

        hook = self._model.register_forward_pre_hook(look)
        self._model.encode(corpora.read(corpus))
        hook.remove()
        self._padding[corpus] = ((padded - useful) / useful, batches)

    def measure(self, turn: str, corpus: Path, limit: int | None) -> Turn:
        """One turn. All vectors come at once, at its end."""
        texts = corpora.read(corpus)
        watch = Stopwatch(self.loaded_bytes)
        with watch.running():
            self._model.encode(texts)
        padding, batches = self._padding.get(corpus, (None, None))
        return Turn(watch.seconds, watch.seconds, padding, batches, peak_bytes=watch.peak_bytes)


class JobContestant:
    """The whole job from a file to a folder, and the bare loop: the same batches, with nothing around them.

    The model is loaded. The job is timed from the call of `run` to its end: it reads the file, tokenises, checks the
    fingerprint, computes and writes one JSON a text into a folder that was not there.

    Both run in one process, so that they have the same model and the same threads. The bare loop replays the batches
    of the latest job, the turn before its own: a job that learns its limit does not make the same ones every time.
    Recording keeps their token ids, a few bytes a token that count as the job's memory; until the bare loop has its
    turn they lie in a file.

    The model only ever runs in short-lived threads, as in a job: a thread that has run torch keeps a pool of OpenMP's
    workers, and while there are more of these than cores they sleep where they would spin.

    A job's folder stays until the benchmark ends: ext4 avoids the inodes of files deleted in the last minutes, and
    with thousands of those in the way making a file takes 0.35 ms instead of 0.01.
    """

    def __init__(self, plan: Plan, work: Path) -> None:
        options = EmbedOptions.from_kwargs(model=plan.model, device=plan.device, backend=plan.backend, dtype=plan.dtype)
        self._encoder: Any = in_thread(lambda: load_encoder(options))
        if (self._encoder.backend, self._encoder.dtype) != (plan.backend, plan.dtype):
            raise RuntimeError(f"{self._encoder!r} was loaded, not {plan.name}")
        self.loaded_bytes = rss_bytes()
        self._work = work / plan.name.replace(" ", "-")
        self._work.mkdir()
        self._folders = count()

    def encoder(self) -> Encoder:
        """The model."""
        encoder: Encoder = self._encoder
        return encoder

    def warm_up(self, corpus: Path) -> None:
        """Run the job once."""
        self._run(corpus, None)

    def measure(self, turn: str, corpus: Path, limit: int | None) -> Turn:
        """One turn of the job, or of the bare loop."""
        return in_thread(lambda: self._replay(corpus)) if turn.startswith("bare") else self._run(corpus, limit)

    def _run(self, corpus: Path, limit: int | None) -> Turn:
        folder = self._work / f"data-{next(self._folders)}"
        options = EmbedOptions(model=self._encoder, save_path=folder, long_texts="truncate")
        watch = Stopwatch(self.loaded_bytes)
        first_s: list[float] = []

        def saved() -> None:
            if not first_s:
                first_s.append(watch.so_far())

        parts = JobParts(
            want_results=False, on_progress=saved, estimator=FixedLimit(limit) if limit is not None else None
        )

        async def job() -> Any:
            with watch.running():
                return await EmbedStream(read_texts(corpus), options, parts).run()

        with self._recording(corpus):
            summary = asyncio.run(job())
        if summary.embedded != summary.texts:
            raise RuntimeError(f"{summary.texts - summary.embedded} of {summary.texts} texts were not computed")
        return Turn(watch.seconds, first_s[0], summary.padding, summary.batches, summary.token_limit, watch.peak_bytes)

    def _replay(self, corpus: Path) -> Turn:
        batches = [as_batch(rows) for rows in load_rows(self._recorded(corpus))]
        watch = Stopwatch(self.loaded_bytes)
        with watch.running():
            under_way: deque[Any] = deque()
            for batch in batches:
                under_way.append(self._encoder.start(batch))
                if len(under_way) >= self._encoder.slots:
                    self._encoder.finish(under_way.popleft())
            while under_way:
                self._encoder.finish(under_way.popleft())
        useful = sum(batch.row_tokens for batch in batches)
        padding = sum(batch.padded_tokens for batch in batches) / useful - 1
        return Turn(watch.seconds, padding=padding, batches=len(batches), peak_bytes=watch.peak_bytes)

    @contextmanager
    def _recording(self, corpus: Path) -> Iterator[None]:
        """Keep the rows of the batches that the encoder is given within the block."""
        start: Callable[[Batch], Any] = self._encoder.start
        batches: Rows = []

        def recording_start(batch: Batch) -> Any:
            batches.append([chunk.ids for chunk in batch.chunks])
            return start(batch)

        self._encoder.start = recording_start  # shadowed on the instance: a wrapper would have to follow the protocol
        try:
            yield
        finally:
            del self._encoder.start
        save_rows(batches, self._recorded(corpus))

    def _recorded(self, corpus: Path) -> Path:
        return self._work / f"{corpus.stem}.npz"


def in_thread(function: Callable[[], T]) -> T:
    """What the function gives in a thread of its own, which then ends."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(function).result()


def as_batch(rows: list[npt.NDArray[np.int32]]) -> Batch:
    """A batch for the encoder, made of ids alone."""
    return Batch(tuple(Chunk(row, 0, "", 0, ids, len(ids)) for row, ids in enumerate(rows)))


def save_rows(batches: Rows, path: Path) -> None:
    """Keep batches in a file."""
    rows = [ids for batch in batches for ids in batch]
    lengths = [len(ids) for ids in rows]
    np.savez(path, ids=np.concatenate(rows), lengths=lengths, n_rows=[len(batch) for batch in batches])


def load_rows(path: Path) -> Rows:
    """The batches of a file."""
    with np.load(path) as kept:
        rows = np.split(kept["ids"], np.cumsum(kept["lengths"])[:-1])
        ends = np.cumsum(kept["n_rows"])
    return [rows[end - n : end] for end, n in zip(ends, np.diff(ends, prepend=0), strict=True)]


def describe(encoder: Encoder, texts: list[str]) -> dict[str, Any]:
    """Number and tokens of texts as the model takes them: without special tokens, cut at what it takes."""
    found = encoder.tokenizer().tokenize(texts)
    whole = np.array([one.n_content for one in found])
    taken = np.minimum(whole, [encoder.max_tokens - one.n_prefix - one.n_suffix for one in found])
    p10, median, p90 = (int(value) for value in np.percentile(taken, [10, 50, 90]))
    return {
        "n_texts": len(texts),
        "n_tokens": int(taken.sum()),
        "tokens_of_a_text": {"mean": round(float(taken.mean()), 1), "p10": p10, "p50": median, "p90": p90},
        "n_cut": int(np.count_nonzero(whole > taken)),
    }
