"""What a folder of results needs of its file system, and what there is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asyncembed.errors import StoreError
from asyncembed.records import Chunk, EmbeddedChunk, EmbeddedText, FloatVector, text_id
from asyncembed.sinks import StoredEmbeddings, open_embeddings
from asyncembed.sinks.codec import encode_json
from asyncembed.sinks.folder import StorePaths, storage_errors
from asyncembed.sinks.record_file import encode_record

BESIDE_BYTES = 350
"""For each text beside its file: a line of the journal, one of the index, and its name in the folder."""

BESIDE_FILES = 8
"""The index, the journal, the lock, their temporary files, the folders."""

_EMPTY: FloatVector = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Room:
    """What a file system has left.

    Attributes:
        path: The folder that was asked about, or the nearest one above it that exists.
        block_bytes: A file takes a multiple of this.
        free_bytes: Bytes that an ordinary user may still write.
        free_files: Files that may still be made; None where there is no such bound.
    """

    path: Path
    block_bytes: int
    free_bytes: int
    free_files: int | None

    @classmethod
    def at(cls, folder: Path) -> Room:
        """The room for a folder that need not exist yet.

        Raises:
            StoreError: A file is in the way, or the file system does not answer.
        """
        path = folder.absolute()
        while not path.exists() and path != path.parent:
            path = path.parent
        if not path.is_dir():
            raise StoreError(f"{path} is a file; choose another save path")
        with storage_errors(str(path)):
            if not hasattr(os, "statvfs"):
                return cls(path, 4096, shutil.disk_usage(path).free, None)
            found = os.statvfs(path)
        return cls(
            path, found.f_frsize or 4096, found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
        )

    def taken_by(self, n_bytes: int) -> int:
        """Bytes that a file of `n_bytes` takes, in whole blocks."""
        return -(-n_bytes // self.block_bytes) * self.block_bytes


def saved_in(folder: Path) -> StoredEmbeddings | None:
    """What is saved in a folder already; None if nothing is."""
    return open_embeddings(folder) if os.path.isdir(StorePaths.of(folder).data) else None


def vector_bytes(vectors: Sequence[FloatVector], dim: int) -> int:
    """Bytes of a vector of `dim` numbers as JSON, measured on `vectors`; guessed if there are none."""
    sizes = [len(encode_json(np.ascontiguousarray(vector[:dim], np.float32))) for vector in vectors]
    return round(sum(sizes) / len(sizes)) if sizes else 12 * dim


def file_bytes(text: str, chunks: Sequence[Chunk], n_vector_bytes: int) -> int:
    """Bytes of the file of a text, as it would be written with vectors of that many bytes."""
    pieces = tuple(EmbeddedChunk(chunk.text, chunk.start, chunk.n_tokens, _EMPTY) for chunk in chunks)
    n_tokens = sum(chunk.n_tokens for chunk in chunks)
    bare = len(encode_record(EmbeddedText(text_id(text), 0, None, text, _EMPTY, pieces, n_tokens), "0" * 16))
    n_vectors = 1 if len(chunks) == 1 else 1 + len(chunks)
    return bare + n_vectors * (n_vector_bytes - len("[]"))
