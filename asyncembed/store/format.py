"""What a format of results has to do. Lock, ledger, fingerprint, keys, failures and resume are the same for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncembed.records import EmbeddedChunk, EmbeddedText, FloatVector

STRANGE = "it was made with other weights or options than the rest of the folder"
"""What a reader says of a text from elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredText:
    """A text as read back from the folder, checked.

    Attributes:
        id: `text_id` of the text.
        text: The text.
        embedding: Shape `(dim,)` float32.
        chunks: The pieces it was embedded in, in order; a text of one piece shares its vector with it.
        n_tokens: Tokens of the text without prompt and special tokens, as embedded.
        fingerprint: Digest of what its vector was made with; None if its file does not say.
    """

    id: str
    text: str
    embedding: FloatVector
    chunks: tuple[EmbeddedChunk, ...]
    n_tokens: int
    fingerprint: str | None = None


class Format(Protocol):
    """Where a folder keeps texts and vectors. All of it blocks; one thread calls it."""

    def ids(self, *, clean: bool = False) -> Iterator[list[str]]:
        """The texts that are there, in blocks, in no order. With `clean`, what a killed run left is removed."""
        ...

    def append(self, records: Sequence[EmbeddedText], made_with: str) -> list[int]:
        """Save a micro-batch, each text there whole or not at all; the bytes that each takes."""
        ...

    def size(self, identity: str) -> int | None:
        """Bytes that a text takes; None if it is not there."""
        ...

    def read(self, identity: str) -> StoredText:
        """A text, checked. `FileNotFoundError` if it is not there, `CorruptRecordError` if it is damaged."""
        ...

    def place(self, identity: str) -> str:
        """The file that a message about a text names."""
        ...

    def remove(self, identity: str) -> None:
        """Take a text away, if it is there."""
        ...

    def wipe(self) -> None:
        """Take all texts away."""
        ...
