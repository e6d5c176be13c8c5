"""Chunk vectors into one vector a text: pure.

A text of one chunk keeps that chunk's vector as it is; more chunks are averaged, weighted by their tokens, so that
every token of the text counts the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncembed.encoders.base import FloatMatrix
from asyncembed.records import Chunk, EmbeddedChunk, FloatVector

AVERAGED_AT_ONCE = 512
"""Vectors of a text that are put into one matrix."""


@dataclass(frozen=True, slots=True, eq=False)
class Assembled:
    """A text that is done with the model.

    Attributes:
        owner: The text's number within the engine.
        embedding: Shape `(dim,)` float32; None if `error` is set.
        chunks: The pieces with their vectors, in order; empty if `error` is set.
        n_tokens: Tokens of the chunks.
        error: Why there is no embedding.
    """

    owner: int
    embedding: FloatVector | None
    chunks: tuple[EmbeddedChunk, ...] = ()
    n_tokens: int = 0
    error: str | None = None


@dataclass(slots=True, eq=False)
class _Open:
    missing: int
    chunks: list[EmbeddedChunk | None] = field(default_factory=list)


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


class Assembler:
    """Collects the vectors of each text's chunks and gives the text when the last has come."""

    def __init__(self, *, normalize: bool = False, truncate_dim: int | None = None) -> None:
        self._normalize = normalize
        self._truncate_dim = truncate_dim
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<Assembler open={len(self)}>"

    def expect(self, owner: int, n_chunks: int) -> None:
        """A text's chunks are on their way."""
        self._open[owner] = _Open(n_chunks, [None] * n_chunks)

    def add(self, chunks: Sequence[Chunk], vectors: FloatMatrix) -> list[Assembled]:
        """The vectors of a batch have come: shape `(len(chunks), dim)`.

        Returns:
            The texts that are done now: complete, or failed by a vector that is NaN, infinite or zero.
        """
        if len(vectors) != len(chunks):
            raise AssertionError(f"{len(chunks)} rows went in and {len(vectors)} came out: this is a bug")
        if self._truncate_dim is not None:
            vectors = vectors[:, : self._truncate_dim]
        try:  # all that takes memory, before anything is changed
            rows = self._usable_rows(vectors)
        except MemoryError:
            rows = None
        if rows is None:
            return self._add_in_halves(chunks, vectors)
        done: list[Assembled] = []
        for chunk, row, vector in zip(chunks, rows, vectors, strict=True):
            finished = self._add_one(chunk, row) if row is not None else self.fail(chunk.owner, defect(vector))
            if finished is not None:
                done.append(finished)
        return done

    def fail(self, owner: int, error: str | None) -> Assembled | None:
        """One of a text's chunks failed: the text is done, without a vector. None if it was done already."""
        if self._open.pop(owner, None) is None:
            return None
        return Assembled(owner, None, error=error)

    def discard(self, owner: int) -> None:
        """Nobody waits for the text any more."""
        self._open.pop(owner, None)

    def clear(self) -> None:
        """Forget all that is open."""
        self._open.clear()

    def _usable_rows(self, vectors: FloatMatrix) -> list[FloatVector | None]:
        """A vector of its own for each row; None for one that is NaN, infinite or zero."""
        sound = np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1))
        usable = np.where(sound[:, np.newaxis], vectors, np.float32(0))
        if self._normalize:
            usable = normalized(usable)
        return [row.copy() if is_sound else None for row, is_sound in zip(usable, sound, strict=True)]

    def _add_in_halves(self, chunks: Sequence[Chunk], vectors: FloatMatrix) -> list[Assembled]:
        """Memory ran out: half of the rows at a time, and at last a text that fails alone."""
        middle = len(chunks) // 2
        if middle == 0:
            finished = [self.fail(chunk.owner, "its vector does not fit into memory") for chunk in chunks]
            return [text for text in finished if text is not None]
        return [*self.add(chunks[:middle], vectors[:middle]), *self.add(chunks[middle:], vectors[middle:])]

    def _add_one(self, chunk: Chunk, vector: FloatVector) -> Assembled | None:
        text = self._open.get(chunk.owner)
        if text is None:
            return None  # failed or discarded while this chunk was under way
        text.chunks[chunk.ordinal] = EmbeddedChunk(chunk.text, chunk.start, chunk.n_tokens, vector)
        text.missing -= 1
        if text.missing:
            return None
        del self._open[chunk.owner]
        chunks = tuple(piece for piece in text.chunks if piece is not None)
        if len(chunks) != len(text.chunks):
            raise AssertionError("a chunk came twice and another never: this is a bug")
        return self._finish(chunk.owner, chunks)

    def _finish(self, owner: int, chunks: tuple[EmbeddedChunk, ...]) -> Assembled:
        if len(chunks) == 1:
            embedding = chunks[0].embedding
        else:
            try:
                embedding = weighted_average(
                    [piece.embedding for piece in chunks], [piece.n_tokens for piece in chunks]
                )
            except MemoryError:
                return Assembled(owner, None, error=f"the average of its {len(chunks)} chunks does not fit into memory")
            if self._normalize:
                embedding = normalized(embedding[np.newaxis])[0]
            if (wrong := defect(embedding)) is not None:
                return Assembled(owner, None, error=f"the average of its {len(chunks)} chunks is unusable: {wrong}")
        return Assembled(owner, embedding, chunks, sum(chunk.n_tokens for chunk in chunks))
