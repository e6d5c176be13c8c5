"""Small encoders and tokenizers for tests of the engine's mechanics: promises about vectors use the real model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from asyncembed.encoders import FloatMatrix, Tokenized
from asyncembed.records import Batch


class WordTokenizer:
    """A token for each word: its length; one special token at each end."""

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        found = []
        for text in texts:
            text.encode()  # refuses lone surrogates, as real tokenizers do
            ids = np.array([1, *(100 + len(word) for word in text.split()), 2], np.int32)
            found.append(Tokenized(ids, 1, 1, 0))
        return found

    def spans(self, text: str) -> list[tuple[int, int]]:
        spans, at = [], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            spans.append((start, at))
        return spans


class FakeEncoder:
    """Vectors that depend on the row alone: `[sum of ids, number of ids, 1, 0, …]`.

    Args:
        dim: Dimensions.
        max_tokens: Most tokens of a row.
        on_batch: Called in the model's thread with each batch before it is computed; may raise.
    """

    name, device, backend, dtype, prompt, slots = "fake", "cpu", "fake", "float32", "", 1

    def __init__(
        self, dim: int = 4, max_tokens: int = 64, on_batch: Callable[[Batch], None] | None = None, slots: int = 1
    ) -> None:
        self.dim, self.max_tokens, self.slots = dim, max_tokens, slots
        self.batches: list[int] = []
        self.rows = 0
        self.threads: set[int] = set()
        self.freed = 0
        self._on_batch = on_batch

    def tokenizer(self) -> WordTokenizer:
        return WordTokenizer()

    def start(self, batch: Batch) -> Any:
        self.threads.add(threading.get_ident())
        if self._on_batch is not None:
            self._on_batch(batch)
        return batch

    def finish(self, handle: Any) -> FloatMatrix:
        vectors = np.zeros((len(handle.chunks), self.dim), np.float32)
        vectors[:, 0] = [chunk.ids.sum() for chunk in handle.chunks]
        vectors[:, 1] = [chunk.length for chunk in handle.chunks]
        vectors[:, 2] = 1
        self.rows += len(handle.chunks)
        return vectors

    def free_memory(self) -> None:
        self.freed += 1

    def fingerprint(self) -> Mapping[str, Any]:
        return {"weights": "fake", "dtype": self.dtype, "dim": self.dim, "max_tokens": self.max_tokens}

    def made_with(self) -> Mapping[str, Any]:
        return {"model": self.name}
