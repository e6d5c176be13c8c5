"""One record in one file: what goes in comes out, and damage is seen."""

from __future__ import annotations

import copy
import json

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asyncembed.errors import CorruptRecordError
from asyncembed.records import EmbeddedChunk, EmbeddedText, text_id
from asyncembed.store.json_files import decode_record, encode_record

from .making import record

_texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.just("lone \ud800 one")
_vectors = hnp.arrays(np.float32, 3, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
_chunks = st.lists(st.tuples(_texts, st.integers(0, 10**6), st.integers(0, 512), _vectors), min_size=1, max_size=3)


@given(text=_texts, vector=_vectors, chunks=_chunks, n_tokens=st.integers(0, 10**9))
def test_encode_record_any_text_reads_back_exactly(text, vector, chunks, n_tokens) -> None:
    pieces = tuple(EmbeddedChunk(*chunk) for chunk in chunks)
    if len(pieces) == 1:
        pieces = (EmbeddedChunk(pieces[0].text, pieces[0].start, pieces[0].n_tokens, vector),)
    identity = text_id(text)
    data = encode_record(EmbeddedText(identity, 0, None, text, vector, pieces, n_tokens))
    json.loads(data)  # any parser reads it
    stored = decode_record(identity, data, "x.json")
    assert (stored.id, stored.text, stored.n_tokens) == (identity, text, n_tokens)
    assert stored.embedding.dtype == np.float32
    assert stored.embedding.tobytes() == (vector + np.float32(0)).tobytes() or np.array_equal(stored.embedding, vector)
    assert [(c.text, c.start, c.n_tokens) for c in stored.chunks] == [(c.text, c.start, c.n_tokens) for c in pieces]
    assert all(np.array_equal(a.embedding, b.embedding) for a, b in zip(stored.chunks, pieces, strict=True))


def test_encode_record_random_floats_round_trip_bit_by_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    vector = bits.view(np.float32)
    vector = vector[np.isfinite(vector)]
    for text in ("plain", "lone \ud800"):
        data = encode_record(
            EmbeddedText(text_id(text), 0, None, text, vector, (EmbeddedChunk(text, 0, 1, vector),), 1)
        )
        assert decode_record(text_id(text), data, "x").embedding.tobytes() == vector.tobytes()


def test_encode_record_of_one_chunk_stores_vector_and_text_once() -> None:
    fields = orjson.loads(encode_record(record("hello")))
    assert list(fields) == ["id", "text", "embedding", "n_tokens", "chunks"]
    assert fields["chunks"] == [{"start": 0, "n_tokens": 3}]


def test_encode_record_view_with_strides_is_stored() -> None:
    vector = np.arange(8, dtype=np.float32)[::2]
    stored = decode_record(
        text_id("a"),
        encode_record(EmbeddedText(text_id("a"), 0, None, "a", vector, (EmbeddedChunk("a", 0, 1, vector),))),
        "x",
    )
    assert stored.embedding.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_encode_record_vector_not_finite_is_a_bug(value: float) -> None:
    with pytest.raises(AssertionError, match="not finite"):
        encode_record(EmbeddedText(text_id("a"), 0, None, "a", np.array([1, value], np.float32)))


def test_decode_record_cut_at_any_byte_is_corrupt() -> None:
    data = encode_record(record("hello"))
    for end in range(len(data)):
        with pytest.raises(CorruptRecordError):
            decode_record(text_id("hello"), data[:end], "x.json")


@pytest.mark.parametrize(
    "change",
    [
        {"text": "other"},
        {"id": text_id("other")},
        {"embedding": []},
        {"embedding": [1, None, 2, 3]},
        {"embedding": [1e300, 0, 0, 0]},
        {"embedding": [[1, 2], [3, 4]]},
        {"embedding": "none"},
        {"chunks": [{"text": "h", "start": 0, "n_tokens": 1, "embedding": [1.0]}] * 2},
        {"chunks": [{"text": "h", "start": 0, "n_tokens": 1}] * 2},
        {"chunks": None},
        {"chunks": []},
        {"n_tokens": -1},
        {"n_tokens": "3"},
        {"text": 5},
        {"text_parts": [5]},
    ],
)
def test_decode_record_changed_field_is_corrupt(change: dict[str, object]) -> None:
    data = orjson.dumps({**orjson.loads(encode_record(record("hello"))), **change})
    with pytest.raises(CorruptRecordError, match=r"x\.json"):
        decode_record(text_id("hello"), data, "x.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"\xff", b"[" * 100_000, b'"\\ud800"', b"[" * 100_000 + b'"\\u00'])
def test_decode_record_other_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptRecordError):
        decode_record(text_id("hello"), data, "x.json")


def test_corrupt_record_error_tells_its_reason_apart_from_path_and_advice() -> None:
    with pytest.raises(CorruptRecordError) as empty:
        decode_record(text_id("hello"), b"", "x.json")
    assert empty.value.reason == "it is empty"
    assert str(empty.value) == "x.json: it is empty; delete the file, and the next run makes it again"
    copied = copy.copy(empty.value)  # rebuilt as pickle does it
    assert (copied.reason, str(copied)) == (empty.value.reason, str(empty.value))
    assert CorruptRecordError("x.json: it is gone").reason == "x.json: it is gone"
