"""What the engine needs of a model: the protocols every backend fulfils."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from asyncembed.records import Batch, TokenIds

FloatMatrix = npt.NDArray[np.float32]

UNLIMITED_TOKENS = 1 << 20
"""`max_tokens` of a model that names no limit."""

CHUNK_OF_UNLIMITED = 512
"""Tokens of a chunk where a model names no limit and a row's memory grows with its square."""


class Tokenized(NamedTuple):
    """A text as token ids.

    Attributes:
        ids: With special tokens, shape `(length,)` int32, never truncated.
        n_prefix: Special tokens before the content.
        n_suffix: Special tokens after it.
        n_unknown: Content tokens that are the unknown token.
    """

    ids: TokenIds
    n_prefix: int
    n_suffix: int
    n_unknown: int

    @property
    def n_content(self) -> int:
        """Tokens that are not special."""
        return len(self.ids) - self.n_prefix - self.n_suffix


class Tokenizer(Protocol):
    """A tokenizer that one thread owns."""

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """All texts in one call. Raises what the library raises, for instance on lone surrogates."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and stop of each content token of `text`, in characters."""
        ...


def padded(rows: Sequence[Any], pad_id: int, *, on_left: bool) -> list[npt.NDArray[np.int64]]:
    """Rows of ids as a model takes them: ids, mask and types, each of shape `(n_rows, longest)` int64."""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(-len(row), None) if on_left else slice(0, len(row))
        ids[number, place] = row
        mask[number, place] = 1
    return [ids, mask, np.zeros_like(ids)]


@runtime_checkable
class IdTokenizer(Tokenizer, Protocol):
    """A tokenizer that can say what token ids mean. Needed only where texts are given as ids.

    Attributes:
        n_vocabulary: Every id is smaller.
        unknown_id: The unknown token; None if the vocabulary has none.
    """

    n_vocabulary: int
    unknown_id: int | None

    def decode(self, ids: Sequence[int]) -> str:
        """The text that these ids stand for, as closely as they tell."""
        ...


def default_chunk_size(encoder: Encoder, max_tokens: int) -> int | None:
    """Tokens of a chunk where none are asked for and a row takes `max_tokens`; None for all of these."""
    size: int | None = getattr(encoder, "default_chunk_size", None)
    return size if max_tokens >= UNLIMITED_TOKENS else None


def pads_rows(encoder: Encoder) -> bool:
    """Whether a batch costs its padded tokens; False of a model that looks its vectors up."""
    pads: bool = getattr(encoder, "pads", True)
    return pads


@runtime_checkable
class Encoder(Protocol):
    """A model: rows of token ids in, vectors out.

    `start` and `finish` are only ever called from one thread; `tokenizer`, `fingerprint` and `made_with` may be called
    from another meanwhile. A failure of any is an exception; out of memory is told by `failures.classify`.

    Attributes:
        name: For a person.
        device: Where it runs: `cpu`, `cuda:0`, ….
        backend: What runs it: `torch`, ….
        dtype: Precision: `float32`, ….
        dim: Dimensions of a vector.
        max_tokens: Most tokens of a row, prompt and special tokens included.
        prompt: Put before every chunk; empty for none.
        slots: Batches it can have under way at once.
    """

    name: str
    device: str
    backend: str
    dtype: str
    dim: int
    max_tokens: int
    prompt: str
    slots: int

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of the caller's own: sharing one between threads raises `Already borrowed`."""
        ...

    def start(self, batch: Batch) -> Any:
        """Put a batch under way and return a handle."""
        ...

    def finish(self, handle: Any) -> FloatMatrix:
        """Wait for a batch: shape `(rows, dim)` float32, a row for each chunk in order."""
        ...

    def free_memory(self) -> None:
        """Give cached memory back, after a failure for lack of it."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """What of the model changes a vector: compared on resume."""
        ...

    def made_with(self) -> Mapping[str, Any]:
        """Versions and the like: recorded, not compared."""
        ...
