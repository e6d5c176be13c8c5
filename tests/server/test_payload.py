"""Bodies in and out: whatever is sent is read or refused with a reason, and what goes out is what was computed."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from asyncembed.embedder import CountedVectors, EmbedderStatistics
from asyncembed.records import TokenText
from asyncembed.server.schema import ApiError, EmbeddingsRequest, encode_answer, parse_request
from asyncembed.server.service import retry_after_s
from asyncembed.server.settings import ServerSettings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
FIELDS = st.sampled_from(["input", "model", "encoding_format", "dimensions", "user", "other"])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


SETTINGS = ServerSettings(max_inputs=4, accept_token_ids=True)


def parse(**fields: Any) -> EmbeddingsRequest:
    return parse_request(orjson.dumps(fields), SETTINGS)


@pytest.mark.parametrize(
    ("given_input", "inputs", "is_list"),
    [
        ("a", ["a"], False),
        (["a"], ["a"], True),
        (["a", "b"], ["a", "b"], True),
        ([5, 6], [TokenText.of([5, 6])], False),
        ([[5, 6], [7]], [TokenText.of([5, 6]), TokenText.of([7])], True),
    ],
)
def test_every_form_of_input_is_read(given_input: Any, inputs: list[Any], is_list: bool) -> None:
    asked = parse(input=given_input, user="somebody")
    assert (asked.inputs, asked.is_list) == (inputs, is_list)
    assert (asked.model, asked.encoding_format, asked.dimensions) == (None, "float", None)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "input", "missing"),
        ({"input": None}, "input", "missing"),
        ({"input": ""}, "input", "empty string"),
        ({"input": []}, "input", "empty list"),
        ({"input": 5}, "input", "not number"),
        ({"input": {"a": 1}}, "input", "not object"),
        ({"input": ["a", ""]}, "input[1]", "empty string"),
        ({"input": ["a", 5]}, "input", "number, string"),
        ({"input": [True]}, "input", "boolean"),
        ({"input": [1.5]}, "input", "number"),
        ({"input": [[]]}, "input[0]", "empty list"),
        ({"input": [[1], [True]]}, "input[1]", "whole numbers"),
        ({"input": [[1], ["a"]]}, "input[1]", "whole numbers"),
        ({"input": [2**40]}, "input", "no token id"),
        ({"input": ["a"] * 5}, "input", "holds 5 texts; this server takes 4"),
        ({"input": "a", "model": 5}, "model", "not number"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'hex'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "not 0"),
        ({"input": "a", "dimensions": True}, "dimensions", "not True"),
        ({"input": "a", "dimensions": "8" * 99}, "dimensions", "..."),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"input": "caf\xe9"}',
        b'{"input": "\\ud8',
        b'\xef\xbb\xbf\xef\xbb\xbf{"input": "a"}',
        b"[" * 100_000,
        b'{"input":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"3",
    ],
)
def test_body_that_is_no_object_or_too_deep_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(body, SETTINGS)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


PIECES = ["\\", '"', "\ud83d", "\ude80", "\udfff", "\ud800", "a", "u", "d8", "\n", "é", "🚀"]


@given(pieces=st.lists(st.sampled_from(PIECES)))
def test_halves_of_pairs_are_replaced_and_nothing_else_changes(pieces: list[str]) -> None:
    text = "a" + "".join(pieces)
    [found] = parse_request(json.dumps({"input": text}).encode(), SETTINGS).inputs
    assert found == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("field", ["encoding_format", "dimensions"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"[" * 1000 + b"]" * 1000, "not list"),
        (b'{"a":' * 1000 + b"0" + b"}" * 1000, "not object"),
        (b'"' + b"x" * 2**20 + b'"', f"not '{'x' * 36}..."),
    ],
    ids=["list", "object", "string"],
)
def test_deep_or_long_value_is_refused_in_a_short_message(field: str, value: bytes, shown: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(b'{"input": "a", "%b": %b}' % (field.encode(), value), SETTINGS)
    assert (caught.value.status, caught.value.param) == (400, field)
    assert caught.value.message.endswith(shown)


@settings(max_examples=60)
@given(body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_request(body, SETTINGS)


@settings(max_examples=60)
@given(fields=st.dictionaries(FIELDS, JSON))
def test_any_fields_are_read_or_refused(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    refusal = None
    try:
        asked = parse_request(body, SETTINGS)
    except ApiError as error:
        refusal = error
    if refusal is not None:
        assert refusal.status == 400
    else:
        assert 1 <= len(asked.inputs) <= 4
        assert all(asked.inputs)


@given(vectors=arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=FLOATS))
def test_floats_and_base64_are_the_same_bits(vectors: Any) -> None:
    counts = CountedVectors(vectors, [2] * len(vectors))
    found = {}
    for form in ("float", "base64"):
        asked = EmbeddingsRequest([], True, None, form, None)
        answer = json.loads(encode_answer(counts, asked, 'a "model"'))
        assert answer["model"] == 'a "model"'
        assert answer["usage"] == {"prompt_tokens": 2 * len(vectors), "total_tokens": 2 * len(vectors)}
        assert [one["index"] for one in answer["data"]] == list(range(len(vectors)))
        found[form] = [one["embedding"] for one in answer["data"]]
    plain = np.array(found["float"], np.float32)
    packed = np.array([np.frombuffer(base64.b64decode(one), "<f4") for one in found["base64"]])
    np.testing.assert_array_equal(plain, vectors)
    np.testing.assert_array_equal(packed, vectors)


def test_dimensions_are_the_first_scaled_to_length_one() -> None:
    vectors = np.array([[3, 4, 12], [0.6, 0.8, 0]], np.float32)
    asked = EmbeddingsRequest([], True, None, "float", 2)
    answer = json.loads(encode_answer(CountedVectors(vectors, [1, 1]), asked, "m"))
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], [[0.6, 0.8]] * 2, rtol=1e-6)


@pytest.mark.parametrize(("waiting", "seconds"), [(0, 1), (100, 1), (1000, 10), (10**6, 60)])
def test_retry_after_is_what_waiting_chunks_take_at_the_pace_so_far(waiting: int, seconds: int) -> None:
    now = EmbedderStatistics("open", texts=200, model_seconds=2.0, waiting_chunks=waiting)
    assert retry_after_s(now) == seconds
