"""The format of one JSON file a text: how it is written, listed, and read back and checked."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from asyncembed.errors import CorruptRecordError
from asyncembed.records import EmbeddedChunk, EmbeddedText, FloatVector, text_id
from asyncembed.store.files import (
    NEW_FILE,
    StorePaths,
    decode_json,
    encode_json,
    flush,
    flush_folder,
    put_in_place,
    remove,
    write_all,
    write_whole,
)
from asyncembed.store.format import StoredText

_log = logging.getLogger("asyncembed")
_RECORD_NAME = re.compile(r"[0-9a-f]{64}\.json")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{64}\.tmp")
_BLOCK = 4096
_MOST_OPEN = 64  # files held open before they are flushed: macOS allows a process 256
_FLUSHERS = 8  # flushes that wait side by side share the file system's own: 2 to 3 times as fast on ext4


class JsonFiles:
    """The per-text files of a folder.

    With `durable`, the files of a micro-batch are all written, then flushed together, then renamed, and their folder
    is flushed once: they outlive a power cut from then on, at a fraction of the cost of doing so for each alone.
    """

    def __init__(self, paths: StorePaths, *, durable: bool = False) -> None:
        self._paths = paths
        self._folder = paths.data
        self._durable = durable

    def __repr__(self) -> str:
        return f"<JsonFiles {self._folder!r}>"

    def place(self, identity: str) -> str:
        """The file of a text."""
        return self._paths.record(identity)

    def ids(self, *, clean: bool = False) -> Iterator[list[str]]:
        """The texts that have a file, in blocks, in no order; nothing is opened, files with other names are left alone.

        With `clean`, empty files, as a power cut leaves them, and temporary ones are removed.
        """
        block: list[str] = []
        try:
            listing = os.scandir(self._folder)
        except FileNotFoundError:
            return
        with listing:
            for entry in listing:
                name = entry.name
                if _RECORD_NAME.fullmatch(name) and entry.is_file():
                    if clean and not entry.stat().st_size:
                        reason = "it is empty, as a power cut leaves a file; its text will be embedded again"
                        _log.warning("%s: %s", entry.path, reason)
                        remove(entry.path)
                        continue
                    block.append(name[:64])
                    if len(block) == _BLOCK:
                        yield block
                        block = []
                elif clean and _TEMPORARY_NAME.fullmatch(name):
                    remove(entry.path)
        if block:
            yield block

    def append(self, records: Sequence[EmbeddedText], made_with: str) -> list[int]:
        """Save a micro-batch."""
        if self._durable:
            return self._append_flushed(records, made_with)
        sizes = []
        for record in records:
            data = encode_record(record, made_with)
            write_whole(self.place(record.id), data, temporary=self._temporary(record.id))
            sizes.append(len(data))
        return sizes

    def size(self, identity: str) -> int | None:
        """Bytes of a text's file; None if there is none."""
        try:
            status = os.stat(self.place(identity))
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, identity: str) -> StoredText:
        """A text, checked."""
        path = self.place(identity)
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.readall()
        except IsADirectoryError as error:
            reason = "it is a folder, not a file; move it away, and the next run makes the file"
            raise CorruptRecordError(f"{path}: {reason}", reason=reason) from error
        return decode_record(identity, data, path)

    def remove(self, identity: str) -> None:
        """Remove a text's file, if there is one."""
        remove(self.place(identity))

    def wipe(self) -> None:
        """Remove the files of all texts, and nothing else."""
        for block in self.ids(clean=True):
            for identity in block:
                self.remove(identity)
        if self._durable:
            flush_folder(self._folder)

    def _append_flushed(self, records: Sequence[EmbeddedText], made_with: str) -> list[int]:
        sizes: list[int] = []
        opened: list[int] = []
        waiting: list[str] = []  # ids whose temporary file is written
        try:
            for record in records:
                data = encode_record(record, made_with)
                waiting.append(record.id)
                opened.append(os.open(self._temporary(record.id), NEW_FILE, 0o666))
                write_all(opened[-1], data)
                sizes.append(len(data))
                if sys.platform == "linux":  # the disk may begin: 1.3 to 1.8 times as fast on ext4
                    os.posix_fadvise(opened[-1], 0, 0, os.POSIX_FADV_DONTNEED)
                if len(opened) == _MOST_OPEN:
                    _flush_and_close(opened)
            _flush_and_close(opened)
            while waiting:
                put_in_place(self._temporary(waiting[-1]), self.place(waiting[-1]))
                waiting.pop()
            flush_folder(self._folder)
        finally:
            while opened:
                os.close(opened.pop())
            for identity in waiting:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary(identity))
        return sizes

    def _temporary(self, identity: str) -> str:
        return f"{self._folder}/.{identity}.tmp"


def _flush_and_close(opened: list[int]) -> None:
    if opened:
        with ThreadPoolExecutor(_FLUSHERS, "asyncembed-flush") as flushers:
            list(flushers.map(flush, opened))  # raises what the first of them raised
    while opened:
        os.close(opened.pop())


def encode_record(record: EmbeddedText, fingerprint: str | None = None) -> bytes:
    """The bytes of a record's file. A text of one chunk stores its vector, and where equal its text, once."""
    if record.embedding is None:
        raise AssertionError(f"text {record.id} is to be stored without a vector: this is a bug")
    vector = _storable(record.embedding)
    if not np.isfinite(vector).all():
        raise AssertionError(f"text {record.id} is to be stored with a vector that is not finite: this is a bug")
    alone = len(record.chunks) == 1
    chunks: list[dict[str, object]] = []
    for chunk in record.chunks:
        entry: dict[str, object] = {} if alone and chunk.text == record.text else {"text": chunk.text}
        entry["start"] = chunk.start
        entry["n_tokens"] = chunk.n_tokens
        if not alone:
            entry["embedding"] = _storable(chunk.embedding)
        chunks.append(entry)
    fields = {"id": record.id, "text": record.text, "embedding": vector, "n_tokens": record.n_tokens, "chunks": chunks}
    return encode_json(fields if fingerprint is None else {**fields, "fingerprint": fingerprint})


def decode_record(identity: str, data: bytes, path: str) -> StoredText:
    """The record that a file holds."""
    try:
        fields = decode_json(data)
        text = _text_of(fields)
        vector = _vector(fields["embedding"], None)
        chunks = tuple(_chunk(entry, text, vector, len(fields["chunks"]) == 1) for entry in fields["chunks"])
        made_with = fields.get("fingerprint")
        n_tokens = _whole(fields["n_tokens"])
        stored = StoredText(
            fields["id"], text, vector, chunks, n_tokens, made_with if isinstance(made_with, str) else None
        )
    except (ValueError, TypeError, KeyError) as error:
        reason = "it is empty" if not data else f"it cannot be read back ({type(error).__name__}: {error})"
        raise _corrupt(path, reason) from error
    if not chunks:
        raise _corrupt(path, "it has no chunks")
    if stored.id != identity or text_id(text) != identity:
        raise _corrupt(path, "its text is not the one that its name says")
    return stored


def _corrupt(path: str, reason: str) -> CorruptRecordError:
    return CorruptRecordError(f"{path}: {reason}; delete the file, and the next run makes it again", reason=reason)


def _storable(vector: FloatVector) -> FloatVector:
    return np.ascontiguousarray(vector, np.float32)


def _text_of(fields: Mapping[str, Any]) -> str:
    # Earlier versions also stored a text of half surrogate pairs as the parts between them.
    text: object = "".join(fields["text_parts"]) if "text_parts" in fields else fields["text"]
    if not isinstance(text, str):
        raise TypeError("the text is no string")
    return text


def _whole(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError("a count is no whole number from 0 on")
    return value


def _vector(values: object, dim: int | None) -> FloatVector:
    if not isinstance(values, list):
        raise TypeError("a vector is no list")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused below
        vector = np.array(values, np.float32)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise ValueError("a vector is empty or not finite")
    if dim is not None and len(vector) != dim:
        raise ValueError(f"a chunk's vector has {len(vector)} numbers, the text's {dim}")
    return vector


def _chunk(entry: Mapping[str, Any], text: str, vector: FloatVector, alone: bool) -> EmbeddedChunk:
    own_text = _text_of(entry) if "text" in entry or not alone else text
    embedding = _vector(entry["embedding"], len(vector)) if "embedding" in entry or not alone else vector
    return EmbeddedChunk(own_text, _whole(entry["start"]), _whole(entry["n_tokens"]), embedding)
