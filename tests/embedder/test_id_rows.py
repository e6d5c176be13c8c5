"""Rows made of given token ids: every id once, none longer than the model takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed import TokenText
from asyncembed.engine.chunkers import IdChunker
from asyncembed.engine.chunking import Chunker
from asyncembed.engine.work import Client, Work
from asyncembed.options import LongTexts
from tests.core.minilm import fast_tokenizer

TOKENIZER = fast_tokenizer()


@pytest.mark.parametrize("overlap", [0, 7])
@given(n_ids=st.integers(1, 400), size=st.integers(8, 60))
def test_rows_of_long_ids_hold_every_id_once_but_for_the_overlap(overlap: int, n_ids: int, size: int) -> None:
    chunker = Chunker(TOKENIZER, 256, chunk_size=size, chunk_overlap=overlap)
    ids = [1037 + number for number in range(n_ids)]
    found = Work(Client(), TokenText.of(ids))
    IdChunker(TOKENIZER, 256, chunker).chunk(found)
    rows = [chunk.ids.tolist() for chunk in found.chunks]
    assert all(row[0] == 101 and row[-1] == 102 and len(row) <= size + 2 for row in rows)
    joined = rows[0][1:-1] + [one for row in rows[1:] for one in row[1 + overlap : -1]]
    assert joined == ids
    assert all(len(row) > overlap + 2 for row in rows[1:])  # none is nothing but what the one before it had


@pytest.mark.parametrize(("long_texts", "n_rows", "dropped"), [("average", 2, 0), ("truncate", 1, 10), ("error", 0, 0)])
def test_long_ids_become_what_long_texts_says(long_texts: LongTexts, n_rows: int, dropped: int) -> None:
    chunker = Chunker(TOKENIZER, 256, chunk_size=20, long_texts=long_texts)
    found = Work(Client(), TokenText.of([1037] * 30))
    IdChunker(TOKENIZER, 256, chunker).chunk(found)
    assert (len(found.chunks), found.dropped_tokens, found.error is not None) == (n_rows, dropped, n_rows == 0)
