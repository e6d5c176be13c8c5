"""One text in one JSON file: how it is written, and how it is read and checked."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from asyncembed.errors import CorruptRecordError
from asyncembed.records import EmbeddedChunk, EmbeddedText, FloatVector, text_id
from asyncembed.sinks.codec import decode_json, encode_json
from asyncembed.sinks.folder import in_the_way

# A high and a low surrogate that stand apart in a `str` become one character when JSON is read back, and the text
# would no longer be the one its id was made from. Such a text is also stored as the parts between them.
_FALSE_PAIR = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")


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
        entry = {} if alone and chunk.text == record.text else _text_fields(chunk.text)
        entry["start"] = chunk.start
        entry["n_tokens"] = chunk.n_tokens
        if not alone:
            entry["embedding"] = _storable(chunk.embedding)
        chunks.append(entry)
    fields = {"id": record.id, **_text_fields(record.text), "embedding": vector}
    made_with = {} if fingerprint is None else {"fingerprint": fingerprint}
    return encode_json({**fields, "n_tokens": record.n_tokens, "chunks": chunks, **made_with})


def decode_record(identity: str, data: bytes, path: str) -> StoredText:
    """The record that a file holds.

    Raises:
        CorruptRecordError: The file is torn or empty, its text is not the one its name says, a vector is not finite,
            or the lengths of its vectors disagree.
    """
    try:
        fields = decode_json(data)
        text = _text_of(fields)
        vector = _vector(fields["embedding"], None)
        chunks = tuple(_chunk(entry, text, vector, len(fields["chunks"]) == 1) for entry in fields["chunks"])
        made_with = fields.get("fingerprint")
        stored = StoredText(
            fields["id"],
            text,
            vector,
            chunks,
            _whole(fields["n_tokens"]),
            made_with if isinstance(made_with, str) else None,
        )
    except (ValueError, TypeError, KeyError) as error:
        reason = "it is empty" if not data else f"it cannot be read back ({type(error).__name__}: {error})"
        raise _corrupt(path, reason) from error
    if stored.id != identity or text_id(text) != identity:
        raise _corrupt(path, "its text is not the one that its name says")
    return stored


def read_record(identity: str, path: str) -> StoredText:
    """Read one file and check it. What is no file is not waited for, as a FIFO would have it.

    Raises:
        CorruptRecordError: As `decode_record`; or a folder, a FIFO, a link to no file is in its place.
        OSError: It cannot be opened or read.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            data = file.readall() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        if in_the_way(path) is None:
            raise
        data = None
    if data is None:
        kind = in_the_way(path) or "something else"
        reason = f"it is {kind}, not a file; move it away, and the next run makes the file"
        raise CorruptRecordError(f"{path}: {reason}", reason=reason)
    return decode_record(identity, data, path)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither the flag nor FIFOs


def _corrupt(path: str, reason: str) -> CorruptRecordError:
    return CorruptRecordError(f"{path}: {reason}; delete the file, and the next run makes it again", reason=reason)


def _storable(vector: FloatVector) -> FloatVector:
    return np.ascontiguousarray(vector, np.float32)


def _text_fields(text: str) -> dict[str, object]:
    parts = _FALSE_PAIR.split(text)
    return {"text": text} if len(parts) == 1 else {"text": text, "text_parts": parts}


def _text_of(fields: Mapping[str, Any]) -> str:
    text: object = "".join(fields["text_parts"]) if "text_parts" in fields else fields["text"]
    if not isinstance(text, str):
        raise TypeError("the text is no string")
    return text


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("a count is no whole number")
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
