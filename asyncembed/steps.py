"""The pipeline turned by hand: the scheduler of a job, synchronous, one step at a time in the calling thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from asyncembed.encoders import Encoder, FailureKind, FloatMatrix, classify
from asyncembed.encoders.base import pads_rows
from asyncembed.engine.admission import AdmissionQueue, life_bytes
from asyncembed.engine.chunking import Chunker, chunk_backing_off
from asyncembed.engine.client import is_window_full
from asyncembed.engine.engine import ModelRunner, Outcome
from asyncembed.engine.limit_memory import LimitMemory
from asyncembed.engine.scheduler import EncoderState, LimitEstimator, Scheduler
from asyncembed.engine.work import Client, Work
from asyncembed.errors import CorruptRecordError, ModelError, ModelOutOfMemoryError, OptionsError
from asyncembed.job import Entry
from asyncembed.job.lookup import Sharing
from asyncembed.records import Batch, Chunk, FloatVector, Rejected, SourceItem, Text, text_id
from asyncembed.sources.feed import to_item
from asyncembed.store import StoredText
from asyncembed.store.store import Found
from asyncembed.store.writer import FolderWriter
from asyncembed.wording import plural

MICRO_BATCH = 64
"""Items taken, and texts tokenised, in one go."""

UNSAVED_TEXTS = 256
"""Texts that have their result and wait to be saved, before no more are taken."""

_END = object()


class PipelineSteps:
    """Fill, choose, embed, settle, save, remove: whoever calls them in a loop runs the job.

    Args:
        encoder: The model, run in the calling thread.
        chunker: Makes chunks.
        limits: The limit of a batch in padded tokens, or what remembers it.
        client: How vectors are normalised and truncated.
        max_bytes: Budget of the texts in flight.
        max_rows: Most rows of a batch.
        writer: The folder, open and claimed; None keeps results in memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        chunker: Chunker,
        limits: LimitEstimator | LimitMemory,
        client: Client,
        *,
        max_bytes: int,
        max_rows: int | None,
        writer: FolderWriter | None,
    ) -> None:
        self._dim = encoder.dim
        self._memory = limits if isinstance(limits, LimitMemory) else None
        self._runner = ModelRunner(encoder, self._memory)
        self._chunker = chunker
        self._client = client
        estimator = limits.estimator if isinstance(limits, LimitMemory) else limits
        self._state = EncoderState(estimator, max_rows, pads=pads_rows(encoder))
        self._scheduler = Scheduler()
        self._writer = writer
        self._admission = AdmissionQueue(max_bytes)
        self._held_back: SourceItem | None = None
        self._n_pulled = self._n_taken = 0
        self._in_hand: dict[Chunk, None] = {}
        self._is_small = False
        self._last: tuple[Sequence[Chunk], FloatMatrix | None, float | None] = ((), None, None)
        self._open: dict[int, Entry] = {}
        self._sharing = Sharing()
        self._finished: deque[Entry] = deque()
        self._saved: deque[Entry] = deque()
        self._given: dict[str, str] = {}
        self._done: dict[str, FloatVector | None] = {}  # texts that have a vector; None where the folder holds it

    def __repr__(self) -> str:
        return f"<PipelineSteps open={self.n_open} unsaved={len(self._finished)} {self._scheduler!r}>"

    @property
    def n_open(self) -> int:
        """Items taken and not yet removed as completed."""
        return len(self._open)

    def fill(self, iterator: Iterator[Any]) -> int:
        """Takes items while there is room for them: how many; 0 if there is no room, or none is left."""
        n_before, has_ended, is_full = self._n_taken, False, False
        while self._has_room() and not (has_ended or is_full):
            group: list[Entry] = []
            try:
                has_ended, is_full = self._take(iterator, group)
            finally:
                self._start(self._look_up(group))
        if has_ended:
            self._client.is_draining = True
        return self._n_taken - n_before

    def next_chunks(self) -> list[Chunk]:
        """The chunks that should run next, together, the same until they are embedded or failed; none if none wait."""
        if not self._in_hand:
            batch = self._scheduler.next_batch(self._state)
            if batch is None:
                return []
            self._in_hand, self._is_small = dict.fromkeys(batch.chunks), batch.is_small
        return list(self._in_hand)

    def embed(self, chunks: Sequence[Chunk]) -> FloatMatrix:
        """Their vectors, shape `(len(chunks), dim)` float32; they are recorded."""
        if not chunks:
            return np.empty((0, self._dim), np.float32)
        batch = self._batch(chunks)
        outcome = self._run(batch)
        if outcome.vectors is not None:
            # A small batch is no sample of the speed of the size in use.
            seconds = None if self._is_small or len(chunks) < len(self._in_hand) else outcome.seconds
            self._last = (batch.chunks, outcome.vectors.copy(), seconds)
            self._record(batch.chunks, outcome.vectors)
            return outcome.vectors
        if outcome.error is None:
            raise AssertionError("a batch without vectors has an error: this is a bug")
        if outcome.kind is not FailureKind.OUT_OF_MEMORY:
            raise outcome.error
        message = str(outcome.error).split("\n", 1)[0]
        raise ModelOutOfMemoryError(f"there is no memory for {plural(len(chunks), 'chunk')} at once: {message}")

    def succeed(self, chunks: Sequence[Chunk], vectors: Any = None) -> None:
        """The limit learns that they ran. Vectors made elsewhere, shape `(len(chunks), dim)`, are recorded."""
        if not chunks:
            return
        last, recorded, seconds = self._last
        is_last = len(last) == len(chunks) and all(one is other for one, other in zip(last, chunks, strict=True))
        if vectors is not None:
            matrix = np.asarray(vectors, np.float32)
            if matrix.shape != (len(chunks), self._dim):
                expected = (len(chunks), self._dim)
                raise OptionsError(f"vectors have the shape {matrix.shape}; those of the chunks have {expected}")
            if is_last and recorded is not None and not np.array_equal(matrix, recorded, equal_nan=True):
                raise OptionsError("`embed` has recorded other vectors of these chunks: it records what it returns")
            self._record(chunks, matrix)
        elif any(chunk in self._in_hand for chunk in chunks):
            raise OptionsError("there are no vectors of these chunks yet: call `embed` before, or give them")
        self._state.estimator.succeed(self._batch(chunks).padded_tokens, seconds if is_last else None)

    def fail(self, chunks: Sequence[Chunk], error: BaseException | None = None) -> None:
        """They could not be embedded: they wait to be tried again in halves; one alone fails its text.

        Out of memory, or no error, lowers the limit; anything else does not.
        """
        if not chunks:
            return
        if error is None or isinstance(error, ModelOutOfMemoryError):
            kind = FailureKind.OUT_OF_MEMORY
        else:
            kind = FailureKind.FATAL if isinstance(error, ModelError) else classify(error)
        batch = self._batch([chunks[row] for row in self._take_from_hand(chunks)])
        if not batch.chunks and kind is FailureKind.OUT_OF_MEMORY:
            self._state.estimator.fail(self._batch(chunks).padded_tokens)
        if not batch.chunks:
            return
        self._finish(self._scheduler.failed(self._state, batch, kind, error))
        if (probe := self._state.take_probe()) is not None:
            outcome = self._run(probe)
            if outcome.kind is not None:
                self._scheduler.failed(self._state, probe, outcome.kind, outcome.error)
            self._state.passed(probe)

    def save(self) -> int:
        """Writes all that is finished, files, keys and errors: how many."""
        if self._writer is not None and self._finished:
            self._writer.commit([entry.record() for entry in self._finished])
        n_saved = len(self._finished)
        self._sharing.settled(self._finished)
        while self._finished:
            entry = self._finished.popleft()
            self._saved.append(entry)
            if entry.work is not None and entry.work.error is None:
                self._done[entry.id] = entry.work.embedding if self._writer is None else None
        return n_saved

    def remove_completed(self) -> int:
        """Gives the memory of what is saved back: how many."""
        removed = len(self._saved)
        while self._saved:
            self._admission.release(self._open.pop(self._saved.popleft().index).reserved)
        return removed

    def load(self) -> dict[str, list[float] | None]:
        """Every text given so far with its vector, read back from the folder; None where there is none."""
        found: dict[str, list[float] | None] = {}
        for identity, text in self._given.items():
            vector = self._done.get(identity)
            if vector is None and identity in self._done and self._writer is not None:
                (stored,) = self._writer.read_many([identity])
                if isinstance(stored, CorruptRecordError):
                    raise stored
                vector = stored.embedding
            found[text] = vector.tolist() if vector is not None else None
        return found

    def close(self) -> None:
        """Completes the folder's index and releases its lock. Idempotent."""
        if self._writer is not None:
            self._writer.close()

    def _has_room(self) -> bool:
        return len(self._finished) < UNSAVED_TEXTS and not is_window_full(self._client, self._state)

    def _take(self, iterator: Iterator[Any], group: list[Entry]) -> tuple[bool, bool]:
        """Takes a micro-batch into `group`, which also has what came before an error of the iterator.

        Returns:
            Whether the iterator has ended, and whether the budget is full: then an item is held back.
        """
        skipped: list[tuple[str | None, Rejected]] = []
        has_ended = is_full = False
        while not (has_ended or is_full) and len(group) + len(skipped) < MICRO_BATCH:
            item, self._held_back = self._held_back, None
            if item is None and (given := next(iterator, _END)) is not _END:
                item = to_item(given, self._n_pulled)
                self._n_pulled += 1
            # 1. the end   2. a row to skip   3. there is room for it   4. there is none
            if item is None:
                has_ended = True
            elif isinstance(item, Rejected) and item.skipped:
                skipped.append((None, item))
            elif self._admission.reserve_nowait(reserved := self._life_of(item)):
                entry = Entry(item, self._n_taken, reserved)
                self._n_taken += 1
                self._open[entry.index] = entry
                group.append(entry)
            else:
                self._held_back, is_full = item, True
        if skipped and self._writer is not None:
            self._writer.reject(skipped)
        return has_ended, is_full

    def _life_of(self, item: SourceItem) -> int:
        text = item.text if isinstance(item, Text) else ""
        return life_bytes(text, self._dim, self._chunker.chunk_size, self._chunker.chunk_overlap)

    def _look_up(self, group: Sequence[Entry]) -> list[Work]:
        """The texts to compute; all other entries are finished, or wait for one that is under way."""
        texts = [entry.item.text for entry in group if isinstance(entry.item, Text)]
        ids = list(map(text_id, texts))
        for identity, text in zip(ids, texts, strict=True):
            self._given.setdefault(identity, text)
        before = self._writer.done.contains_many(ids) if self._writer is not None else [False] * len(ids)
        found = [Found(name, there, name in self._done) for name, there in zip(ids, before, strict=True)]
        self._sharing.settled_meanwhile.clear()
        new, saved, finished = self._sharing.sort(self._client, group, found)
        for entry in saved:
            # What an earlier run has saved is read once; damaged, it is new again.
            if entry.id in self._done or self._is_whole(entry.id):
                self._finished.append(entry)
            else:
                self._sharing.join(self._client, entry, new, finished)
        self._finished.extend(finished)
        return new

    def _is_whole(self, identity: str) -> bool:
        if self._writer is not None and isinstance(self._writer.read_many([identity])[0], StoredText):
            self._done[identity] = None
            return True
        return False

    def _start(self, works: Sequence[Work]) -> None:
        """Cuts new texts into chunks, which then wait."""
        if not works:
            return
        chunk_backing_off(self._chunker.chunk, works)
        for work in works:
            if work.error is not None:
                work.fail(work.error)
            else:
                work.expect()
        self._finish([work for work in works if not work.is_open])
        self._scheduler.push([work for work in works if work.is_open])

    def _finish(self, works: Sequence[Work]) -> None:
        for work in works:
            if work.is_pending:
                work.average()
            self._finished.extend(work.take_waiters())

    def _run(self, batch: Batch) -> Outcome:
        outcome = self._runner.advance(batch, self._memory.estimator.learnt() if self._memory is not None else None)
        # Asked without another, a model that takes several batches at once finishes those under way, oldest first:
        # one that an interrupt left behind, then this one.
        while outcome is None or outcome.batch is not batch:
            outcome = self._runner.advance(None)
        return outcome

    def _record(self, chunks: Sequence[Chunk], vectors: FloatMatrix) -> None:
        """Keeps the vectors of chunks in hand; texts that are complete wait to be saved."""
        if rows := self._take_from_hand(chunks):
            batch = self._batch([chunks[row] for row in rows])
            self._finish(self._scheduler.succeeded(self._state, batch, vectors[rows]))

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        return Batch(tuple(chunks), pads=self._state.pads)

    def _take_from_hand(self, chunks: Sequence[Chunk]) -> list[int]:
        """Which of the chunks were handed out and not yet embedded or failed; from here on they are."""
        rows = [row for row, chunk in enumerate(chunks) if chunk in self._in_hand]
        for row in rows:
            del self._in_hand[chunks[row]]
        return rows
