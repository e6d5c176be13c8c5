"""A text on its way through the engine, and how the vectors of its chunks become one.

A text of one chunk keeps that chunk's vector as it is; more chunks are averaged, weighted by their tokens, so that
every token of the text counts the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyncembed.encoders import Instruction
from asyncembed.encoders.base import FloatMatrix
from asyncembed.records import AnyText, Chunk, EmbeddedChunk, FloatVector

AVERAGED_AT_ONCE = 512
"""Vectors of a text that are put into one matrix; a text of more is averaged outside the event loop."""


_NO_INSTRUCTION = Instruction()


class Client:
    """Whose texts they are: one of those that share the engine, such as a job or the requests of an app.

    Attributes:
        normalize: Scale vectors to length 1.
        truncate_dim: Keep only the first dimensions; None keeps all.
        is_held: None of its chunks may run now.
        is_draining: No more of its texts will come.
        is_stopped: Its texts are not wanted any more.
        n_tokens: Tokens of its chunks that wait in the heap, prompt and special tokens included.
        n_chunks: How many wait there.
        served_at: The heap's count of batches when one was last chosen for it.
    """

    def __init__(self, *, normalize: bool = False, truncate_dim: int | None = None) -> None:
        self.normalize = normalize
        self.truncate_dim = truncate_dim
        self.is_held = False
        self.is_draining = False
        self.is_stopped = False
        self.n_tokens = 0
        self.n_chunks = 0
        self.served_at = 0

    def settled(self, done: Iterable[Work]) -> None:
        """A batch with chunks of this client has ended, and these texts are finished."""

    def fail(self, error: Exception) -> None:
        """The engine has ended with an error."""


@dataclass(slots=True, eq=False)
class Work:
    """One distinct text, with all there is to know of it while it is in flight.

    Attributes:
        client: Whose it is.
        text: The text, or its token ids.
        priority: Class of urgency; lower is sooner.
        instruction: What the model is told with it.
        waiters: Who wants it; what these are is the client's own affair.
        chunks: Its pieces, from when it is chunked until it is done.
        n_tokens: Tokens of the chunks, without prompt and special tokens.
        dropped_tokens: Tokens cut off by `long_texts="truncate"`.
        unknown_tokens: Tokens that the model's vocabulary does not know.
        ticket: The place of its first chunk among all that came into the heap; the others follow.
        embedded: The chunks with their vectors, in order.
        embedding: Shape `(dim,)` float32; None until it is done, or if `error` is set.
        error: Why there is no embedding.
        is_open: It is neither done nor dropped.
    """

    client: Client
    text: AnyText
    priority: int = 0
    instruction: Instruction = _NO_INSTRUCTION
    waiters: list[Any] = field(default_factory=list)
    chunks: tuple[Chunk, ...] = ()
    n_tokens: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    ticket: int = -1
    embedded: list[EmbeddedChunk | None] = field(default_factory=list)
    embedding: FloatVector | None = None
    error: str | None = None
    is_open: bool = True
    _missing: int = 0

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return self.is_open and not self.client.is_stopped

    @property
    def is_pending(self) -> bool:
        """Whether its waiters are still to be told, so that another may join them."""
        return self.is_open or (self.is_large and self.embedding is None and self.error is None)

    @property
    def is_large(self) -> bool:
        """Whether its average takes so long that the event loop should not compute it."""
        return len(self.embedded) > AVERAGED_AT_ONCE

    def expect(self) -> None:
        """Prepares for the vectors of its chunks."""
        self._missing = len(self.chunks)
        self.embedded = [None] * self._missing

    def add(self, chunk: Chunk, vector: FloatVector) -> bool:
        """Takes the vector of a chunk; whether it was the last. A large text still needs its `average` then."""
        self.embedded[chunk.ordinal] = EmbeddedChunk(chunk.text, chunk.start, chunk.n_tokens, vector)
        self._missing -= 1
        if self._missing:
            return False
        self.is_open = False
        if len(self.embedded) == 1:
            self.embedding = vector
        elif not self.is_large:
            self.average()
        return True

    def average(self) -> None:
        """Computes its vector from those of its chunks, or says why there is none."""
        pieces = self.pieces()
        how_many = f"the average of its {len(pieces)} chunks"
        try:
            found = weighted_average([piece.embedding for piece in pieces], [piece.n_tokens for piece in pieces])
        except MemoryError:
            self.fail(f"{how_many} does not fit into memory")
            return
        if self.client.normalize:
            found = normalized(found[np.newaxis])[0]
        if (wrong := defect(found)) is not None:
            self.fail(f"{how_many} is unusable: {wrong}")
        else:
            self.embedding = found

    def fail(self, error: str) -> None:
        """Ends it without a vector."""
        self.error, self.is_open, self.embedded, self.n_tokens = error, False, [], 0

    def take_waiters(self) -> list[Any]:
        """Who waited, now that it is done. They are forgotten here, which ends the circle of references."""
        waiters, self.waiters, self.chunks = self.waiters, [], ()
        return waiters

    def pieces(self) -> tuple[EmbeddedChunk, ...]:
        """All chunks with their vectors, in order; none if it failed."""
        if None in self.embedded:
            raise AssertionError("a chunk came twice and another never: this is a bug")
        return tuple(self.embedded)  # type: ignore[arg-type]  # none of them is None, as was just seen


def add_vectors(chunks: Sequence[Chunk], vectors: FloatMatrix) -> list[Work]:
    """Gives the vectors of a batch, shape `(len(chunks), dim)`, to their texts.

    Returns:
        The texts that are done now: complete, or failed by a vector that is NaN, infinite or zero.
    """
    if len(vectors) != len(chunks):
        raise AssertionError(f"{len(chunks)} rows went in and {len(vectors)} came out: this is a bug")
    client: Client = chunks[0].work.client
    if any(chunk.work.client is not client for chunk in chunks):
        mine = np.array([chunk.work.client is client for chunk in chunks])
        ours = [chunk for chunk, is_mine in zip(chunks, mine, strict=True) if is_mine]
        others = [chunk for chunk, is_mine in zip(chunks, mine, strict=True) if not is_mine]
        return add_vectors(ours, vectors[mine]) + add_vectors(others, vectors[~mine])
    cut = vectors if client.truncate_dim is None else vectors[:, : client.truncate_dim]
    try:  # all that takes memory, before anything is changed
        rows = _usable_rows(cut, normalize=client.normalize)
    except MemoryError:
        rows = None
    if rows is None:  # half of the rows at a time, and at last a text that fails alone
        middle = len(chunks) // 2
        if middle:
            return add_vectors(chunks[:middle], vectors[:middle]) + add_vectors(chunks[middle:], vectors[middle:])
        return _fail(chunks[0], "its vector does not fit into memory")
    done: list[Work] = []
    for chunk, row in zip(chunks, rows, strict=True):
        work: Work = chunk.work
        if work.is_open and row is not None and work.add(chunk, row):
            done.append(work)
    if any(row is None for row in rows):
        for chunk, row, vector in zip(chunks, rows, cut, strict=True):
            if row is None:
                done += _fail(chunk, defect(vector) or "its vector is unusable")
    return done


def _fail(chunk: Chunk, reason: str) -> list[Work]:
    work: Work = chunk.work
    if not work.is_open:
        return []
    work.fail(reason)
    return [work]


def _usable_rows(vectors: FloatMatrix, *, normalize: bool) -> list[FloatVector | None]:
    """A vector of its own for each row; None for one that is NaN, infinite or zero."""
    sound = np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1))
    if sound.all():
        usable = normalized(vectors) if normalize else vectors
        return [row.copy() for row in usable]
    usable = np.where(sound[:, np.newaxis], vectors, np.float32(0))
    if normalize:
        usable = normalized(usable)
    return [row.copy() if is_sound else None for row, is_sound in zip(usable, sound, strict=True)]


def weighted_average(vectors: Sequence[FloatVector] | FloatMatrix, weights: Sequence[int]) -> FloatVector:
    """The mean of `n` vectors of shape `(dim,)`, weighted by `weights`: shape `(dim,)` float32.

    Summed in float64, some hundred vectors at a time: a text of a hundred thousand chunks needs no second copy of all.
    """
    total = np.zeros(len(vectors[0]), np.float64)
    for start in range(0, len(vectors), AVERAGED_AT_ONCE):
        part = slice(start, start + AVERAGED_AT_ONCE)
        total += np.asarray(weights[part], np.float64) @ np.asarray(vectors[part], np.float64)
    return np.asarray(total / sum(weights), np.float32)


def normalized(vectors: FloatMatrix) -> FloatMatrix:
    """Rows of shape `(n, dim)` scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled: FloatMatrix = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32, copy=False)
    return scaled


def defect(vector: FloatVector) -> str | None:
    """What is wrong with a vector that must not be stored; None if nothing is."""
    if np.isnan(vector).any():
        return "the model returned NaN for it"
    if np.isinf(vector).any():
        return "the model returned infinity for it"
    if not vector.any():
        return "the model returned a vector of zeros for it"
    return None
