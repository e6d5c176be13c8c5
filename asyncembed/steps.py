"""The pipeline turned by hand: the same cores as a job, synchronous, one step at a time in the calling thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asyncembed.admission import AdmissionQueue, life_bytes
from asyncembed.assembly import Assembled, Assembler
from asyncembed.chunking import Chunker
from asyncembed.consumer import LimitEstimator
from asyncembed.encoders import Encoder, FailureKind, FloatMatrix, classify
from asyncembed.errors import ModelOutOfMemoryError
from asyncembed.heap import ChunkHeap
from asyncembed.records import Batch, Chunk, EmbeddedText, FloatVector, Rejected, SourceItem, Text, text_id
from asyncembed.sinks import open_embeddings
from asyncembed.sinks.writer import FolderWriter
from asyncembed.sources.feed import to_item

WINDOW_BATCHES = 32
"""Batches' worth of tokens that wait at most, so that a fitting batch can be chosen; see `heap`."""

FILL_TEXTS = 64
"""Texts tokenised in one call."""

_END = object()


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    """A text taken from the iterator; its position is its number within the pipeline."""

    position: int
    text: Text
    id: str
    reserved: int


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
        self._encoder = encoder
        self._chunker = chunker
        self._estimator = estimator
        self._assembler = assembler
        self._max_rows = max_rows
        self._writer = writer
        self._heap = ChunkHeap()
        self._admission = AdmissionQueue(max_bytes)
        self._open: dict[int, _Taken] = {}
        self._finished: deque[EmbeddedText] = deque()
        self._saved: deque[int] = deque()
        self._held_back: SourceItem | None = None
        self._n_items = 0
        self._given: dict[str, str] = {}
        self._vectors: dict[str, FloatVector] = {}
        self.failures: list[EmbeddedText] = []

    def __repr__(self) -> str:
        return f"<PipelineSteps open={len(self._open)} unsaved={len(self._finished)} {self._heap!r}>"

    @property
    def n_open(self) -> int:
        """Texts taken and not yet removed as completed."""
        return len(self._open)

    def fill(self, iterator: Iterator[Any]) -> int:
        """Take texts while there is room for them: how many; 0 if there is no room, or no text is left."""
        taken = 0
        while self._heap.n_tokens < WINDOW_BATCHES * self._estimator():
            group = self._admit(iterator)
            taken += len(group)
            self._start([text for text in group if self._is_new(text)])
            if len(group) < FILL_TEXTS:
                break
        return taken

    def next_chunks(self) -> list[Chunk]:
        """The chunks that should run next, together; none if nothing waits."""
        batch = self._heap.take(self._estimator(), self._max_rows)
        return list(batch.chunks) if batch is not None else []

    def embed(self, chunks: Sequence[Chunk]) -> FloatMatrix:
        """Their vectors, shape `(len(chunks), dim)` float32.

        Raises:
            ModelOutOfMemoryError: They do not fit into memory together.
        """
        if not chunks:
            return np.empty((0, self._encoder.dim), np.float32)
        try:
            return self._encoder.finish(self._encoder.start(Batch(tuple(chunks))))
        except Exception as error:
            if classify(error) is not FailureKind.OUT_OF_MEMORY:
                raise
            message = str(error).split("\n", 1)[0]
        # Outside the `except` block, whose traceback would keep the batch's tensors alive.
        self._encoder.free_memory()
        raise ModelOutOfMemoryError(f"{len(chunks)} chunks do not fit into memory together: {message}")

    def succeed(self, chunks: Sequence[Chunk], vectors: FloatMatrix, seconds: float | None = None) -> None:
        """Their vectors are right: the limit learns, and texts that are complete wait to be saved."""
        if chunks:
            self._estimator.succeed(Batch(tuple(chunks)).padded_tokens, seconds)
            for done in self._assembler.add(chunks, vectors):
                self._finish(done)

    def fail(self, chunks: Sequence[Chunk]) -> None:
        """They did not fit into memory: the limit falls, and they wait again; one alone fails its text."""
        if not chunks:
            return
        batch = Batch(tuple(chunks))
        self._estimator.fail(batch.padded_tokens)
        if len(chunks) > 1:
            self._heap.put_back(batch)
            return
        reason = f"a chunk of {chunks[0].length} tokens does not fit into memory even alone"
        done = self._assembler.fail(chunks[0].owner, reason)
        if done is not None:
            self._heap.discard(done.owner)
            self._finish(done)

    def save(self) -> int:
        """Write the files of all finished texts: how many."""
        records = list(self._finished)
        if self._writer is not None and records:
            self._writer.commit(records)
        self._finished.clear()
        for record in records:
            self._saved.append(record.index)
            if record.error is not None:
                self.failures.append(record)
            elif self._writer is None and record.embedding is not None:
                self._vectors[record.id] = record.embedding
        return len(records)

    def remove_completed(self) -> int:
        """Give the memory of saved texts back: how many."""
        removed = len(self._saved)
        while self._saved:
            self._admission.release(self._open.pop(self._saved.popleft()).reserved)
        return removed

    def load(self) -> dict[str, list[float] | None]:
        """Every text given so far with its vector, read back from the folder; None where there is none."""
        stored = open_embeddings(self._writer.paths.root) if self._writer is not None else None
        found: dict[str, list[float] | None] = {}
        for identity, text in self._given.items():
            vector = self._vectors.get(identity)
            if vector is None and stored is not None and text in stored:
                vector = stored[text].embedding
            found[text] = vector.tolist() if vector is not None else None
        return found

    def _admit(self, iterator: Iterator[Any]) -> list[_Taken]:
        """Up to a micro-batch of texts that fit the budget."""
        group: list[_Taken] = []
        while len(group) < FILL_TEXTS:
            item, self._held_back = self._held_back, None
            if item is None:
                given = next(iterator, _END)
                if given is _END:
                    self._heap.drain()
                    break
                item = to_item(given, self._n_items)
            if isinstance(item, Rejected):
                self.failures.append(EmbeddedText("", self._n_items, item.key, "", None, error=item.reason))
                self._n_items += 1
                continue
            reserved = life_bytes(item.text, self._encoder.dim, self._chunker.chunk_size)
            if not self._admission.reserve_nowait(reserved):
                self._held_back = item
                break
            group.append(_Taken(self._n_items, item, text_id(item.text), reserved))
            self._n_items += 1
        return group

    def _is_new(self, taken: _Taken) -> bool:
        """Whether a text must be computed: it is not saved, and neither done nor under way in this run."""
        is_repeat = taken.id in self._given
        self._given.setdefault(taken.id, taken.text.text)
        is_saved = self._writer is not None and taken.id in self._writer.done
        if is_repeat or is_saved:
            self._admission.release(taken.reserved)
        return not (is_repeat or is_saved)

    def _start(self, group: Sequence[_Taken]) -> None:
        if not group:
            return
        self._open.update((taken.position, taken) for taken in group)
        results = self._chunker.chunk([(taken.position, taken.text.text, 0) for taken in group])
        for taken, result in zip(group, results, strict=True):
            if result.error is not None:
                self._finish(Assembled(taken.position, None, error=result.error))
            else:
                self._assembler.expect(taken.position, len(result.chunks))
                self._heap.push(result.chunks)

    def _finish(self, done: Assembled) -> None:
        taken = self._open[done.owner]
        self._finished.append(
            EmbeddedText(
                taken.id,
                taken.position,
                taken.text.key,
                taken.text.text,
                done.embedding,
                done.chunks,
                done.n_tokens,
                done.error,
            )
        )
