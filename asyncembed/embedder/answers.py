"""What a caller gets of a request that is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from asyncembed.embedder.desk import Request
from asyncembed.encoders import FloatMatrix
from asyncembed.records import EmbeddedText, FloatVector, text_id


class CountedVectors(NamedTuple):
    """Vectors of several texts, and their tokens.

    Attributes:
        vectors: Shape `(n, dim)` float32, in order.
        n_tokens: Tokens of each text, without prompt and special tokens.
    """

    vectors: FloatMatrix
    n_tokens: list[int]


def vector_of(request: Request) -> FloatVector:
    """The only vector, shape `(dim,)`."""
    vector: FloatVector = request.vectors[0]
    return vector


def matrix_of(request: Request) -> FloatMatrix:
    """All vectors, shape `(n, dim)`."""
    return request.vectors


def counted_of(request: Request) -> CountedVectors:
    """All vectors, and their tokens."""
    return CountedVectors(request.vectors, request.n_tokens)


def records_of(request: Request) -> list[EmbeddedText]:
    """A record for each text."""
    return [
        EmbeddedText(
            id=text_id(str(text)),
            index=index,
            key=None,
            text=str(text),
            embedding=None if index in request.errors else request.vectors[index],
            n_tokens=request.n_tokens[index],
            error=request.errors.get(index),
        )
        for index, text in enumerate(request.texts)
    ]


def with_faults(records: Sequence[EmbeddedText], faults: Mapping[int, str]) -> list[EmbeddedText]:
    """Records of the texts, and between them, where each was, those of the items that were no texts."""
    rest = iter(records)
    return [
        EmbeddedText(id="", index=index, key=None, text="", embedding=None, error=faults[index])
        if index in faults
        else replace(next(rest), index=index)
        for index in range(len(records) + len(faults))
    ]
