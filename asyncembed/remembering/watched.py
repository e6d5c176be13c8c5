"""An encoder whose batches are watched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asyncembed.encoders import Encoder, FloatMatrix
from asyncembed.encoders.base import Tokenizer
from asyncembed.errors import KilledBeforeError
from asyncembed.records import Batch

if TYPE_CHECKING:
    from asyncembed.remembering.keeper import LimitKeeper


class _UnderWay:
    """A batch that was started, with its handle, and its outcome once it has ended."""

    __slots__ = ("error", "handle", "n_tokens", "vectors")

    def __init__(self, n_tokens: int, handle: Any) -> None:
        self.n_tokens = n_tokens
        self.handle = handle
        self.vectors: FloatMatrix | None = None
        self.error: Exception | None = None


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
        except Exception as error:
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
        except Exception as error:
            batch.error = error
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
