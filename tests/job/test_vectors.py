"""The vectors of a job are those of `SentenceTransformer.encode`, with the real model."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import Batch, embed_stream, open_embeddings, read_texts
from tests.conftest import NOTES
from tests.poison import Poisonable

COSINE = 0.99999


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


async def test_every_example_text_has_the_vector_that_encode_gives(model: Any, tmp_path: Path) -> None:
    """One chunk: equal to `encode`. Several: the token-weighted mean of the chunks' own `encode`."""
    async with embed_stream(read_texts(NOTES), model=model, save_path=tmp_path) as stream:
        records = [record async for record in stream]
    assert stream.summary.failed == 0
    with NOTES.open(encoding="utf-8", newline="") as file:
        rows = [row[0] for row in csv.reader(file)]
    assert [record.text for record in sorted(records, key=lambda r: r.index)] == rows

    short = [record for record in records if len(record.chunks) == 1]
    expected = model.encode([record.text for record in short])
    assert cosines(np.stack([record.embedding for record in short]), expected).min() >= COSINE

    long = [record for record in records if len(record.chunks) > 1]
    assert len(long) >= 5
    special = 2
    for record in long:
        pieces = [chunk.text for chunk in record.chunks]
        lengths = [len(ids) - special for ids in model.tokenizer(pieces)["input_ids"]]
        assert lengths == [chunk.n_tokens for chunk in record.chunks]
        assert max(lengths) + special <= model.max_seq_length
        mean = np.average(model.encode(pieces).astype(np.float64), axis=0, weights=lengths)
        assert cosines(record.embedding[None], mean[None])[0] >= COSINE
        np.testing.assert_allclose(record.embedding, mean, atol=2e-6)
        for chunk in record.chunks:
            assert record.text[chunk.start : chunk.start + len(chunk.text)] == chunk.text

    stored = open_embeddings(tmp_path)
    ids, matrix = stored.to_numpy(rows, order="input")
    by_index = sorted(records, key=lambda r: r.index)
    assert ids == [record.id for record in by_index]
    np.testing.assert_array_equal(matrix, np.stack([record.embedding for record in by_index]))


TEXTS = ["one", "a second text, somewhat longer than the first", "third", "数学は楽しい", "wind and water " * 20]


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize_embeddings": True},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"prompt": "Represent this sentence: "},
        {"batch_size": 1},
    ],
    ids=str,
)
async def test_setting_has_the_effect_it_has_in_encode(model: Any, settings: dict[str, Any]) -> None:
    vectors = await embed_stream(TEXTS, model=model, save_path=None, **settings)
    expected = model.encode(TEXTS, **settings)
    ours = np.stack([vectors[text] for text in TEXTS])
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    assert cosines(ours, expected).min() >= COSINE
    np.testing.assert_allclose(ours, expected, atol=1e-4)


async def test_named_prompt_of_the_model_is_used(model: Any) -> None:
    before = dict(model.prompts)
    model.prompts["query"] = "query: "
    try:
        vectors = await embed_stream(TEXTS, model=model, save_path=None, prompt_name="query")
        expected = model.encode(TEXTS, prompt_name="query")
    finally:
        model.prompts.clear()
        model.prompts.update(before)
    assert cosines(np.stack([vectors[text] for text in TEXTS]), expected).min() >= COSINE


async def test_truncated_long_text_has_the_vector_that_encode_truncates_to(model: Any) -> None:
    text = "A sentence that goes on about boats and harbours. " * 60
    async with embed_stream([text], model=model, save_path=None, long_texts="truncate") as stream:
        vectors = await stream
    assert cosines(vectors[text][None], model.encode([text]))[0] >= COSINE
    n_tokens = len(model.tokenizer(text, truncation=False, verbose=False)["input_ids"]) - 2
    assert stream.summary.dropped_tokens == n_tokens - (model.max_seq_length - 2)


async def test_long_text_is_a_failed_record_when_asked(model: Any) -> None:
    async with embed_stream(["short", "boat " * 300], model=model, save_path=None, long_texts="error") as stream:
        vectors = await stream
    assert vectors["boat " * 300] is None
    assert vectors["short"] is not None
    assert "300 tokens" in stream.failures[0].error


class ReadAhead(Poisonable):
    """The real model, whose first batch waits until all texts were read: else padding depends on who is faster."""

    def __init__(self, encoder: Any, texts: Sequence[str]) -> None:
        super().__init__(encoder)
        self._texts = texts
        self._read = threading.Event()

    def start(self, batch: Batch) -> Any:
        assert self._read.wait(60)
        return super().start(batch)

    def texts(self) -> Iterator[str]:
        yield from self._texts
        self._read.set()


async def test_padding_of_a_mixed_corpus_is_small(encoder: Any) -> None:
    """At most 8 % of texts of very different lengths, though few, while the limit is being tuned.

    Twenty rows at a time in the order of arrival, it would be more than 100 %.
    """
    words = ["stone", "river", "lamp", "garden", "winter", "paper", "silver", "engine", "morning", "cloud"]
    rng = np.random.default_rng(7)
    lengths = np.clip(np.exp(rng.normal(3.2, 0.9, 600)), 2, 200).astype(int)
    assert sum(20 * part.max() for part in lengths.reshape(-1, 20)) > 2 * lengths.sum()
    ahead = ReadAhead(encoder, [" ".join(rng.choice(words, n)) + f" {i}" for i, n in enumerate(lengths)])
    async with embed_stream(ahead.texts(), model=ahead, save_path=None, token_limit=1024) as stream:
        await stream
    assert 0 < stream.summary.padding <= 0.08
