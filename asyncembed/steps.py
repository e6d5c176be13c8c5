"""The pipeline turned by hand: the same cores as a job, synchronous, one step at a time in the calling thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from asyncembed.admission import AdmissionQueue, life_bytes
from asyncembed.assembly import Assembled, Assembler
from asyncembed.chunking import Chunker, chunk_backing_off
from asyncembed.consumer import ModelRunner, Outcome
from asyncembed.encoders import Encoder, FailureKind, FloatMatrix, classify
from asyncembed.errors import CorruptRecordError, ModelError, ModelOutOfMemoryError, OptionsError
from asyncembed.heap import ChunkHeap
from asyncembed.job import Pending
from asyncembed.lane import WINDOW_CHUNKS, window_tokens
from asyncembed.records import Batch, Chunk, FloatVector, Rejected, SourceItem, Text, text_id
from asyncembed.scheduler import LimitEstimator, Scheduler
from asyncembed.sinks import StoredText
from asyncembed.sinks.writer import FolderWriter
from asyncembed.sources.feed import to_item
from asyncembed.wording import plural

MICRO_BATCH = 64
"""Items taken, and texts tokenised, in one go."""

_END = object()


class StepIntake:
    """Takes items while they fit the budget.

    Attributes:
        open: Items taken and not yet released, by position.
        n_taken: Items taken so far.
    """

    def __init__(
        self,
        max_bytes: int,
        life_of: Callable[[str], int],
        on_skipped: Callable[[list[tuple[str | None, Rejected]]], None],
    ) -> None:
        self.open: dict[int, Pending] = {}
        self.n_taken = 0
        self._admission = AdmissionQueue(max_bytes)
        self._life_of = life_of
        self._on_skipped = on_skipped
        self._held_back: SourceItem | None = None
        self._n_pulled = 0

    def __repr__(self) -> str:
        return f"<StepIntake open={len(self.open)} {self._admission!r}>"

    def take(self, iterator: Iterator[Any], group: list[Pending]) -> tuple[bool, bool]:
        """Take a micro-batch into `group`, which also has what came before an error of the iterator.

        Returns:
            Whether the iterator has ended, and whether the budget is full.
        """
        skipped: list[tuple[str | None, Rejected]] = []
        ended = is_full = False
        while not (ended or is_full) and len(group) + len(skipped) < MICRO_BATCH:
            item = self._next(iterator)
            if item is None:
                ended = True
            elif isinstance(item, Rejected) and item.skipped:
                skipped.append((None, item))
            else:
                is_full = not self._admit(item, group)
        if skipped:
            self._on_skipped(skipped)
        return ended, is_full

    def release(self, pending: Pending) -> None:
        """An item is done with: give its reservation back."""
        self._admission.release(self.open.pop(pending.index).reserved)

    def _next(self, iterator: Iterator[Any]) -> SourceItem | None:
        item, self._held_back = self._held_back, None
        if item is None and (given := next(iterator, _END)) is not _END:
            item = to_item(given, self._n_pulled)
            self._n_pulled += 1
        return item

    def _admit(self, item: SourceItem, group: list[Pending]) -> bool:
        """Reserve an item's life; without room for it, it is held back for the next time."""
        reserved = self._life_of(item.text if isinstance(item, Text) else "")
        if not self._admission.reserve_nowait(reserved):
            self._held_back = item
            return False
        pending = Pending(item, self.n_taken, reserved)
        self.n_taken += 1
        self.open[pending.index] = pending
        group.append(pending)
        return True


UNSAVED_TEXTS = 256
"""Texts that have their result and wait to be saved, before no more are taken."""


class PipelineSteps:
    """Fill, choose, embed, settle, save, remove: whoever calls them in a loop runs the job.

    Args:
        encoder: The model, run in the calling thread.
        chunker: Makes chunks.
        estimator: The limit of a batch in padded tokens.
        assembler: Puts vectors together.
        max_bytes: Budget of the texts in flight.
        max_rows: Most rows of a batch.
        writer: The folder, open and claimed; None keeps results in memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        chunker: Chunker,
        estimator: LimitEstimator,
        assembler: Assembler,
        *,
        max_bytes: int,
        max_rows: int | None,
        writer: FolderWriter | None,
    ) -> None:
        self._dim = encoder.dim
        self._runner = ModelRunner(encoder)
        self._chunker = chunker
        self._estimator = estimator
        self._assembler = assembler
        self._writer = writer
        self._heap = ChunkHeap()
        self._scheduler = Scheduler(self._heap, estimator, max_rows=max_rows, is_wanted=self._is_wanted)
        self._in_hand: dict[Chunk, None] = {}
        self._is_small = False
        self._last: tuple[Sequence[Chunk], FloatMatrix, float | None] = (
            (),
            np.empty((0, encoder.dim), np.float32),
            None,
        )
        self._intake = StepIntake(max_bytes, self._life_of, self._reject)
        self._leaders: dict[str, Pending] = {}
        self._finished: deque[Pending] = deque()
        self._saved: deque[Pending] = deque()
        self._given: dict[str, str] = {}
        self._done: dict[str, FloatVector | None] = {}  # texts that have a vector; None where the folder holds it

    def __repr__(self) -> str:
        return f"<PipelineSteps open={self.n_open} unsaved={len(self._finished)} {self._heap!r}>"

    @property
    def n_open(self) -> int:
        """Items taken and not yet removed as completed."""
        return len(self._intake.open)

    def fill(self, iterator: Iterator[Any]) -> int:
        """Take items while there is room for them: how many; 0 if there is no room, or none is left.

        Raises:
            Exception: What the iterator raised; the items before it are taken.
        """
        n_before, ended, is_full = self._intake.n_taken, False, False
        while self._has_room() and not (ended or is_full):
            group: list[Pending] = []
            try:
                ended, is_full = self._intake.take(iterator, group)
            finally:
                self._start(self._sort(group))
        if ended:
            self._heap.drain()
        return self._intake.n_taken - n_before

    def next_chunks(self) -> list[Chunk]:
        """The chunks that should run next, together, the same until they are embedded or failed; none if none wait."""
        if not self._in_hand:
            batch = self._scheduler.next_batch()
            if batch is None:
                return []
            self._in_hand, self._is_small = dict.fromkeys(batch.chunks), batch.is_small
        return list(self._in_hand)

    def embed(self, chunks: Sequence[Chunk]) -> FloatMatrix:
        """Their vectors, shape `(len(chunks), dim)` float32; they are recorded.

        Raises:
            ModelOutOfMemoryError: They do not fit into memory together.
            Exception: What the model raised: one of the texts may be at fault.
        """
        if not chunks:
            return np.empty((0, self._dim), np.float32)
        batch = Batch(tuple(chunks))
        outcome = self._run(batch)
        if outcome.vectors is not None:
            # A small batch is no sample of the speed of the size in use.
            seconds = None if self._is_small or len(chunks) < len(self._in_hand) else outcome.seconds
            self._last = (batch.chunks, outcome.vectors.copy(), seconds)
            self._scheduler.succeeded(batch)
            self._record(batch.chunks, outcome.vectors)
            return outcome.vectors
        if outcome.error is None:
            raise AssertionError("a batch without vectors has an error: this is a bug")
        if outcome.kind is not FailureKind.OUT_OF_MEMORY:
            raise outcome.error
        message = str(outcome.error).split("\n", 1)[0]
        raise ModelOutOfMemoryError(f"there is no memory for {plural(len(chunks), 'chunk')} at once: {message}")

    def succeed(self, chunks: Sequence[Chunk], vectors: Any = None) -> None:
        """The limit learns that they ran. Vectors made elsewhere are recorded.

        Args:
            chunks: The chunks.
            vectors: Shape `(len(chunks), dim)`; None for those that `embed` returned.

        Raises:
            OptionsError: They are not the vectors of these chunks, or there are none yet.
        """
        if not chunks:
            return
        last, recorded, seconds = self._last
        is_last = len(last) == len(chunks) and all(one is other for one, other in zip(last, chunks, strict=True))
        if vectors is not None:
            matrix = np.asarray(vectors, np.float32)
            if matrix.shape != (len(chunks), self._dim):
                expected = (len(chunks), self._dim)
                raise OptionsError(f"vectors have the shape {matrix.shape}; those of the chunks have {expected}")
            if is_last and not np.array_equal(matrix, recorded, equal_nan=True):
                raise OptionsError("`embed` has recorded other vectors of these chunks: it records what it returns")
            self._record(chunks, matrix)
        elif any(chunk in self._in_hand for chunk in chunks):
            raise OptionsError("there are no vectors of these chunks yet: call `embed` before, or give them")
        self._estimator.succeed(Batch(tuple(chunks)).padded_tokens, seconds if is_last else None)

    def fail(self, chunks: Sequence[Chunk], error: BaseException | None = None) -> None:
        """They could not be embedded: they wait to be tried again in halves; one alone fails its text.

        Args:
            chunks: The chunks.
            error: Why. Out of memory, or None, lowers the limit; anything else does not.

        Raises:
            ModelError: The error says that the device is dead, or the model fails on all that it is given.
        """
        if not chunks:
            return
        if error is None or isinstance(error, ModelOutOfMemoryError):
            kind = FailureKind.OUT_OF_MEMORY
        else:
            kind = FailureKind.FATAL if isinstance(error, ModelError) else classify(error)
        batch = Batch(tuple(chunks[row] for row in self._take_from_hand(chunks)))
        if not batch.chunks and kind is FailureKind.OUT_OF_MEMORY:
            self._estimator.fail(Batch(tuple(chunks)).padded_tokens)
        if not batch.chunks:
            return
        given_up = self._scheduler.failed(batch, kind, error)
        if given_up is not None:
            done = self._assembler.fail(given_up.chunk.owner, given_up.reason)
            if done is not None:
                self._heap.discard(done.owner)
                self._finish(done)
        if self._scheduler.has_probe:
            self._run_probe()

    def _run_probe(self) -> None:
        probe = self._scheduler.next_batch()
        if probe is None:
            raise AssertionError("a probe is the next batch: this is a bug")
        outcome = self._run(probe)
        if outcome.kind is not None:
            self._scheduler.failed(probe, outcome.kind, outcome.error)
        self._scheduler.succeeded(probe)

    def _run(self, batch: Batch) -> Outcome:
        outcome = self._runner.advance(batch)
        # Asked without another, a model that takes several batches at once finishes those under way, oldest first:
        # one that an interrupt left behind, then this one.
        while outcome is None or outcome.batch is not batch:
            outcome = self._runner.advance(None)
        return outcome

    def _record(self, chunks: Sequence[Chunk], vectors: FloatMatrix) -> None:
        """Keep the vectors of chunks in hand; texts that are complete wait to be saved."""
        rows = self._take_from_hand(chunks)
        for done in self._assembler.add([chunks[row] for row in rows], vectors[rows]):
            self._finish(done)

    def _take_from_hand(self, chunks: Sequence[Chunk]) -> list[int]:
        """Which of the chunks were handed out and not yet embedded or failed; from here on they are."""
        rows = [row for row, chunk in enumerate(chunks) if chunk in self._in_hand]
        for row in rows:
            del self._in_hand[chunks[row]]
        return rows

    def _is_wanted(self, chunk: Chunk) -> bool:
        pending = self._intake.open.get(chunk.owner)
        return pending is not None and pending.result is None

    def save(self) -> int:
        """Write all that is finished, files, keys and errors: how many."""
        if self._writer is not None and self._finished:
            self._writer.commit([pending.record() for pending in self._finished])
        n_saved = len(self._finished)
        while self._finished:
            pending = self._finished.popleft()
            self._saved.append(pending)
            if self._leaders.get(pending.id) is pending:
                del self._leaders[pending.id]
            if isinstance(pending.result, Assembled) and pending.result.error is None:
                self._done[pending.id] = pending.result.embedding if self._writer is None else None
        return n_saved

    def remove_completed(self) -> int:
        """Give the memory of what is saved back: how many."""
        removed = len(self._saved)
        while self._saved:
            self._intake.release(self._saved.popleft())
        return removed

    def load(self) -> dict[str, list[float] | None]:
        """Every text given so far with its vector, read back from the folder; None where there is none.

        Raises:
            CorruptRecordError: A file was damaged since it was written.
        """
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
        """Complete the folder's index and release its lock. Idempotent."""
        if self._writer is not None:
            self._writer.close()

    def _has_room(self) -> bool:
        if len(self._heap) >= WINDOW_CHUNKS or len(self._finished) >= UNSAVED_TEXTS:
            return False
        return self._heap.n_tokens < window_tokens(self._estimator)

    def _life_of(self, text: str) -> int:
        return life_bytes(text, self._dim, self._chunker.chunk_size, self._chunker.chunk_overlap)

    def _reject(self, rows: list[tuple[str | None, Rejected]]) -> None:
        if self._writer is not None:
            self._writer.reject(rows)

    def _sort(self, group: Sequence[Pending]) -> list[Pending]:
        """Those to compute; all others are finished, or wait for one that is under way."""
        new: list[Pending] = []
        before = self._saved_before(group)
        for pending in group:
            leader = self._leaders.get(pending.id)
            # 1. no text at all   2. repeats one under way   3. saved by an earlier run
            # 4. repeats one that this run has done   5. new
            if isinstance(pending.item, Rejected):
                self._finished.append(pending)
            elif leader is not None:
                pending.is_duplicate = True
                self._follow(leader, pending)
            elif pending.id in before:
                pending.cached = True
                self._finished.append(pending)
            elif pending.id in self._done:
                pending.is_duplicate = True
                self._finished.append(pending)
            else:
                self._leaders[pending.id] = pending
                new.append(pending)
        return new

    def _saved_before(self, group: Sequence[Pending]) -> set[str]:
        """Ids of the group's texts that an earlier run has saved; one whose file is damaged is new again."""
        for pending in group:
            if isinstance(pending.item, Text):
                pending.id = text_id(pending.text)
                self._given.setdefault(pending.id, pending.text)
        ids = list(dict.fromkeys(pending.id for pending in group if pending.id and pending.id not in self._leaders))
        if self._writer is None:
            return set()
        saved = [identity for identity, there in zip(ids, self._writer.done.contains_many(ids), strict=True) if there]
        unread = [identity for identity in saved if identity not in self._done]
        for identity, stored in zip(unread, self._writer.read_many(unread), strict=True):
            if isinstance(stored, StoredText):
                self._done[identity] = None
        return {identity for identity in saved if identity in self._done}

    def _follow(self, leader: Pending, pending: Pending) -> None:
        if leader.result is None:
            leader.followers.append(pending)
        else:
            pending.result = leader.result
            self._finished.append(pending)

    def _start(self, group: Sequence[Pending]) -> None:
        """Make chunks of new texts; each is known to heap and assembler by its position."""
        if not group:
            return
        results = chunk_backing_off(self._chunker.chunk, [(pending.index, pending.text, 0) for pending in group])
        for pending, result in zip(group, results, strict=True):
            if result.error is not None:
                self._finish(Assembled(pending.index, None, error=result.error))
            else:
                self._assembler.expect(pending.index, len(result.chunks))
                self._heap.push(result.chunks)

    def _finish(self, done: Assembled) -> None:
        leader = self._intake.open[done.owner]
        followers, leader.followers = leader.followers, []
        for pending in (leader, *followers):
            pending.result = done
            self._finished.append(pending)
