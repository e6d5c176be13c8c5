"""Chunking that goes on when memory runs out: smaller groups, and in the end a text that fails alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from asyncembed.chunking import ChunkedText
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.wording import plural

logger = logging.getLogger("asyncembed")

T = TypeVar("T")

_DOES_NOT_FIT = "the text does not fit into memory while it is cut into chunks"


def chunk_backing_off(
    chunk: Callable[[Sequence[T]], Sequence[ChunkedText]], texts: Sequence[T]
) -> Sequence[ChunkedText]:
    """`chunk(texts)`: one result each, in order.

    Out of memory, the texts are tried in halves; one that does not fit alone, tried twice, is a failed text.
    """
    found = _try(chunk, texts)
    if found is not None:
        return found
    logger.info("out of memory while tokenising %s; trying smaller groups", plural(len(texts), "text"))
    gc.collect()  # once: it takes a tenth of a second where torch is loaded
    return _in_parts(chunk, texts)


def _try(chunk: Callable[[Sequence[T]], Sequence[ChunkedText]], texts: Sequence[T]) -> Sequence[ChunkedText] | None:
    """The chunks, or None if memory ran out: by then all that was made of the texts is given back."""
    try:
        return chunk(texts)
    except Exception as error:
        if classify(error) is not FailureKind.OUT_OF_MEMORY:
            raise
    return None


def _in_parts(chunk: Callable[[Sequence[T]], Sequence[ChunkedText]], texts: Sequence[T]) -> Sequence[ChunkedText]:
    middle = len(texts) // 2
    if middle == 0:
        return _try(chunk, texts) or [ChunkedText(error=_DOES_NOT_FIT)]
    results: list[ChunkedText] = []
    for part in (texts[:middle], texts[middle:]):
        results += _try(chunk, part) or _in_parts(chunk, part)
    return results
