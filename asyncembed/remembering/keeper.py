"""Remembers what an estimator learns, and watches the batches that are larger than any before."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from asyncembed.encoders import Encoder, FloatMatrix, Tokenizer
from asyncembed.errors import KilledBeforeError
from asyncembed.limits import LearntLimit, estimator_for
from asyncembed.memory import available_bytes, memory_bound, peak_rss_bytes, tokens_that_fit
from asyncembed.records import Batch
from asyncembed.remembering.limit_file import LimitFile, Remembered

RETUNE_AFTER_S = 30 * 86_400
"""The fastest size is searched for again after so long: drivers and libraries change."""

FORGET_KILL_AFTER_S = 7 * 86_400
"""A size that a run was killed for is doubted after so long: it may have been a neighbour's fault, or a person's."""

STEPS_PER_DOUBLING = 16
"""A batch counts as larger than any before in steps of 4 %, so that a handful of notes is written and not a hundred."""

LOOK_EVERY = 32
"""Batches between two looks at how much memory is free."""

DEATHS_TO_GIVE_UP = 2
"""A chunk that ran alone at so many deaths fails its text: one death may be a neighbour's fault, or a person's."""

MEMORY_STEP = 64 << 20
"""The machine's memory is told apart in such steps; kernels differ by a few pages from boot to boot."""


class LimitKeeper:
    """The estimator of a run, begun with what earlier runs learnt, and its encoder, watched.

    `before` and `after` are called in the model's thread, around every batch. They touch the disk only when a batch
    is larger than any that has run on this machine, or when something was learnt that the next run should know.
    """

    def __init__(
        self,
        encoder: Encoder,
        token_limit: int | None = None,
        *,
        file: LimitFile | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.plain_encoder = encoder
        self._clock = clock
        self._file = (file or LimitFile(identity(encoder))) if token_limit is None else None
        known = self._recall() if self._file is not None else None
        self._kept = known
        learnt = known.learnt if known is not None else None
        self.estimator = estimator_for(encoder.device, token_limit, learnt=learnt, slots=encoder.slots)
        self.encoder: Encoder = encoder if self._file is None else WatchedEncoder(encoder, self)
        self._largest = known.largest if known is not None else 0
        self._killed_at = learnt.killed_at if learnt is not None else None
        self._deaths = dict(known.deaths) if known is not None else {}
        self._bytes_per_token = known.bytes_per_token if known is not None else None
        self._shares_memory = encoder.device.split(":")[0] in ("cpu", "mps")
        self._process = psutil.Process()
        self._trial: int | None = None
        self._rss_before = 0
        self._peak_before = 0
        self._n_batches = 0
        self._look()

    def __repr__(self) -> str:
        return f"<LimitKeeper {self.estimator!r} largest={self._largest} {self._file!r}>"

    def is_suspect(self, batch: Batch) -> bool:
        """Whether a batch is one chunk as large as a batch that a run was killed in: such a chunk runs alone."""
        return self._killed_at is not None and len(batch.chunks) == 1 and batch.padded_tokens >= self._killed_at

    def is_given_up(self, batch: Batch) -> bool:
        """Whether a batch is one chunk that ran alone at two deaths: it would kill every run."""
        is_known = bool(self._deaths) and len(batch.chunks) == 1
        return is_known and self._deaths.get(digest_of(batch), 0) >= DEATHS_TO_GIVE_UP

    def survived(self, chunk: str) -> None:
        """A chunk has run alone: an earlier death was not its fault."""
        self._deaths.pop(chunk, None)

    def before(self, n_tokens: int, chunk: str | None = None) -> None:
        """A batch of `n_tokens` padded tokens is about to run; `chunk` is the digest of one that runs alone."""
        if self._file is None:
            return
        if self._is_news(self.estimator.learnt()):
            self.save()
        self._n_batches += 1
        if self._n_batches % LOOK_EVERY == 0:
            self._look()
        if n_tokens <= max(self._largest, self._trial or 0):
            return
        if self._shares_memory:  # elsewhere memory that runs out is an exception
            self._file.begin_trial(n_tokens, chunk)
            self._rss_before, self._peak_before = int(self._process.memory_info().rss), peak_rss_bytes()
        self._trial = n_tokens

    def after(self, n_tokens: int, error: BaseException | None = None) -> None:
        """A batch of `n_tokens` padded tokens has run, or ended in an error: either way the process lives."""
        if self._file is None or self._trial is None or n_tokens < self._trial:
            return
        self._trial = None
        if error is None:
            self._largest = step_above(n_tokens)
            self._measure(n_tokens)
            self.save()  # first: a note may outlive the batch, but must not be gone before it is known to have run
        self._file.end_trial()

    def save(self) -> None:
        """Keep what is known now."""
        if self._file is None:
            return
        learnt = self.estimator.learnt()
        self._kept = Remembered(
            learnt=learnt,
            largest=self._largest,
            bytes_per_token=self._bytes_per_token,
            tuned_at=self._tuned_at(learnt),
            killed_on=self._kept.killed_on if self._kept is not None and learnt.killed_at is not None else None,
            deaths=self._deaths,
        )
        if learnt.fastest is None and not learnt.failed_at and not learnt.killed_at and not self._largest:
            return  # nothing has run
        self._file.store(self._kept)

    def close(self) -> None:
        """The run is over: keep what it learnt, and withdraw its note. It may be used again."""
        if self._file is not None:
            self.save()
            self._trial = None
            self._file.end_trial()

    def _recall(self) -> Remembered | None:
        """What earlier runs left, with those that were killed, and without what is too old."""
        if self._file is None:
            raise AssertionError("there is no file to recall from: this is a bug")
        known, now = self._file.load(), self._clock()
        if known is not None:
            learnt = known.learnt
            if known.killed_on is None or not 0 <= now - known.killed_on < FORGET_KILL_AFTER_S:
                learnt = replace(learnt, killed_at=None)
            if known.tuned_at is None or not 0 <= now - known.tuned_at < RETUNE_AFTER_S:
                learnt = replace(learnt, is_old=True)
            known = replace(known, learnt=learnt)
        deaths = self._file.take_deaths()
        if not deaths:
            return known
        smallest = min(death.n_tokens for death in deaths)
        known = known or Remembered(learnt=LearntLimit(limit=smallest))
        counts = Counter({**known.deaths}) + Counter(death.chunk for death in deaths if death.chunk is not None)
        known = replace(
            known,
            learnt=known.learnt.after_kill(smallest),
            largest=min(known.largest, smallest - 1),
            killed_on=now,
            deaths=dict(counts),
        )
        self._file.store(known)
        return known

    def _tuned_at(self, learnt: LearntLimit) -> float | None:
        if learnt.fastest is None:
            return None
        kept = self._kept
        # Not found anew: still being searched for again, or as it was kept.
        if kept is not None and (learnt.is_old or (kept.learnt.fastest == learnt.fastest and not kept.learnt.is_old)):
            return kept.tuned_at
        return self._clock()

    def _is_news(self, learnt: LearntLimit) -> bool:
        """Whether the next run should know it at once, and not only if this one ends well."""
        kept = self._kept.learnt if self._kept is not None else None
        known = (kept.failed_at, kept.fastest) if kept is not None else (None, None)
        return (learnt.failed_at, learnt.fastest) != known

    def _measure(self, n_tokens: int) -> None:
        """What a token takes while its batch runs: seen when the process has reached a new peak."""
        peak = peak_rss_bytes()
        if self._shares_memory and peak > max(self._peak_before, self._rss_before):
            self._bytes_per_token = (peak - self._rss_before) / n_tokens
            self._look()

    def _look(self) -> None:
        """Heed how much memory is free: where it is the process's own, running out of it is a kill."""
        if self._file is not None and self._shares_memory and self._bytes_per_token is not None:
            fitting = tokens_that_fit(available_bytes(), self._bytes_per_token, self.plain_encoder.slots)
            self.estimator.keep_below(fitting)


def step_above(n_tokens: int) -> int:
    """The end of the step that `n_tokens` lies in: batches up to there are as good as tried. At most 5 % above it."""
    step = 1
    while step < n_tokens:
        step = max(step + 1, int(step * 2 ** (1 / STEPS_PER_DOUBLING)))
    return step


def identity(encoder: Encoder) -> dict[str, Any]:
    """What decides about an encoder's batches: the model, what runs it, and on what machine."""
    name = str(Path(encoder.name).resolve()) if os.path.isdir(encoder.name) else encoder.name
    return {
        "model": name,
        "dim": encoder.dim,
        "max_tokens": encoder.max_tokens,
        "backend": encoder.backend,
        "dtype": encoder.dtype,
        "device": encoder.device,
        "device_memory": _device_memory(encoder.device),
        "cpus": os.cpu_count(),
        "memory": memory_bound() // MEMORY_STEP * MEMORY_STEP,
    }


def _device_memory(device: str) -> str:
    """A GPU's name and memory; empty for a CPU."""
    if not device.startswith("cuda"):
        return ""
    import torch

    facts = torch.cuda.get_device_properties(torch.device(device))
    return f"{facts.name} {facts.total_memory}"


class _UnderWay:
    """A batch that was started, with its handle, and its outcome once it has ended."""

    __slots__ = ("error", "handle", "n_tokens", "vectors")

    def __init__(self, n_tokens: int, handle: Any) -> None:
        self.n_tokens = n_tokens
        self.handle = handle
        self.vectors: FloatMatrix | None = None
        self.error: BaseException | None = None


class WatchedEncoder:
    """Does what its encoder does, and tells the keeper of every batch before it starts and after it has ended.

    A chunk as large as a batch that a run was killed in runs alone, so that its note cannot blame another: batches
    under way are waited for before it starts, and it ends before the next begins. One that killed two runs so is not
    tried.
    """

    def __init__(self, encoder: Encoder, keeper: LimitKeeper) -> None:
        self.name, self.device, self.backend, self.dtype = encoder.name, encoder.device, encoder.backend, encoder.dtype
        self.dim, self.max_tokens, self.prompt = encoder.dim, encoder.max_tokens, encoder.prompt
        self.slots = encoder.slots
        self._encoder = encoder
        self._keeper = keeper
        self._under_way: list[_UnderWay] = []

    def __repr__(self) -> str:
        return f"<WatchedEncoder {self._encoder!r}>"

    def __getattr__(self, name: str) -> Any:
        """What an encoder may have besides, such as the model's own `prompts`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._encoder, name)

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of the caller's own."""
        return self._encoder.tokenizer()

    def start(self, batch: Batch) -> Any:
        """Put a batch under way and return a handle.

        Raises:
            KilledBeforeError: It is a chunk that two runs were killed on.
        """
        if self._keeper.is_given_up(batch):
            raise KilledBeforeError(batch.padded_tokens)
        chunk = None
        if self._keeper.is_suspect(batch):
            for other in self._under_way:
                self._end(other)
            chunk = digest_of(batch)
        n_tokens = batch.padded_tokens
        self._keeper.before(n_tokens, chunk)
        try:
            handle = _UnderWay(n_tokens, self._encoder.start(batch))
        except BaseException as error:
            self._keeper.after(n_tokens, error)
            raise
        if chunk is not None:
            self._end(handle)
            self._keeper.survived(chunk)
        self._under_way.append(handle)
        return handle

    def finish(self, handle: Any) -> FloatMatrix:
        """Wait for a batch: shape `(rows, dim)` float32."""
        self._under_way.remove(handle)
        self._end(handle)
        if handle.vectors is None:
            raise handle.error
        vectors: FloatMatrix = handle.vectors
        return vectors

    def _end(self, batch: _UnderWay) -> None:
        """Wait for a batch and tell the keeper; what became of it stays with it."""
        if batch.vectors is not None or batch.error is not None:
            return
        try:
            batch.vectors = self._encoder.finish(batch.handle)
        except BaseException as error:
            batch.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            batch.handle = None
            self._keeper.after(batch.n_tokens, batch.error)

    def free_memory(self) -> None:
        """Give cached memory back."""
        self._encoder.free_memory()

    def fingerprint(self) -> Mapping[str, Any]:
        """What of the model changes a vector."""
        return self._encoder.fingerprint()

    def made_with(self) -> Mapping[str, Any]:
        """Versions and the like."""
        return self._encoder.made_with()


def digest_of(batch: Batch) -> str:
    """What a batch of one chunk is known by in a note: a hash of its token ids."""
    return hashlib.sha256(batch.chunks[0].ids.tobytes()).hexdigest()[:32]
