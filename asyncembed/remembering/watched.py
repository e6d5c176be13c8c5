"""An encoder whose batches are watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from asyncembed.encoders import Encoder, FloatMatrix
from asyncembed.encoders.base import Tokenizer
from asyncembed.records import Batch


class BatchWatch(Protocol):
    """Told of every batch, in the model's thread."""

    def before(self, n_tokens: int) -> None:
        """A batch of `n_tokens` padded tokens is about to run."""
        ...

    def after(self, n_tokens: int, error: BaseException | None = None) -> None:
        """It has run, or ended in an error."""
        ...


class WatchedEncoder:
    """Does what its encoder does, and tells of every batch before it starts and after it has ended.

    Args:
        encoder: The model.
        watch: Is told.
    """

    def __init__(self, encoder: Encoder, watch: BatchWatch) -> None:
        self.name, self.device, self.backend, self.dtype = encoder.name, encoder.device, encoder.backend, encoder.dtype
        self.dim, self.max_tokens, self.prompt = encoder.dim, encoder.max_tokens, encoder.prompt
        self.slots = encoder.slots
        self._encoder = encoder
        self._watch = watch

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
        """Put a batch under way and return a handle."""
        n_tokens = batch.padded_tokens
        self._watch.before(n_tokens)
        try:
            return n_tokens, self._encoder.start(batch)
        except BaseException as error:
            self._watch.after(n_tokens, error)
            raise

    def finish(self, handle: Any) -> FloatMatrix:
        """Wait for a batch: shape `(rows, dim)` float32."""
        n_tokens, inner = handle
        try:
            vectors = self._encoder.finish(inner)
        except BaseException as error:
            self._watch.after(n_tokens, error)
            raise
        self._watch.after(n_tokens)
        return vectors

    def free_memory(self) -> None:
        """Give cached memory back."""
        self._encoder.free_memory()

    def fingerprint(self) -> Mapping[str, Any]:
        """What of the model changes a vector."""
        return self._encoder.fingerprint()

    def made_with(self) -> Mapping[str, Any]:
        """Versions and the like."""
        return self._encoder.made_with()
