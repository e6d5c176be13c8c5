"""The real model behind an embedder: its vectors, its prompts, and a storm that nobody is left hanging in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import AsyncEmbedder, TextError
from asyncembed.encoders.torch_encoder import TorchEncoder
from asyncembed.records import Batch
from tests.conftest import NOTES

from .doubles import at_rest

pytestmark = pytest.mark.usefixtures("no_leftovers")

TEXTS = [line.strip('"') for line in NOTES.read_text(encoding="utf-8").splitlines()[:60] if 20 < len(line) < 400]


def cosines(found: Any, wanted: Any) -> Any:
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return np.sum(found * wanted, axis=-1) / lengths


async def test_embed_many_at_once_gives_the_vectors_of_encode(encoder: Any, model: Any) -> None:
    async with AsyncEmbedder(encoder) as embedder:
        together = await embedder.embed(TEXTS)
        apart = await asyncio.gather(*map(embedder.embed, TEXTS))
        assert embedder.statistics().batches < len(TEXTS)
    wanted = model.encode(TEXTS)
    assert cosines(together, wanted).min() >= 0.99999
    assert cosines(np.stack(apart), wanted).min() >= 0.99999


async def test_embed_query_and_document_give_the_vectors_of_encode_query_and_encode_document(model: Any) -> None:
    before = dict(model.prompts)
    model.prompts.update({"query": "Find a passage about: ", "document": "", "passage": "A passage: "})
    try:
        async with AsyncEmbedder(model) as embedder:
            queries, documents, titles = await asyncio.gather(
                embedder.embed_query(TEXTS[:8]),
                embedder.embed_document(TEXTS[:8]),
                embedder.embed(TEXTS[:8], prompt_name="passage"),
            )
        assert cosines(queries, model.encode_query(TEXTS[:8])).min() >= 0.99999
        assert cosines(documents, model.encode_document(TEXTS[:8])).min() >= 0.99999
        assert cosines(titles, model.encode(TEXTS[:8], prompt_name="passage")).min() >= 0.99999
        assert cosines(queries, documents).max() < 0.999  # the control: prompts matter
    finally:
        model.prompts.clear()
        model.prompts.update(before)


async def test_embed_prompts_of_a_model_that_pools_without_them_share_a_batch_rightly(model: Any) -> None:
    """Such a model is told the prompt's length, one for a batch: rows of other prompts go in a pass of their own."""
    pooling = model[1]
    pooling.include_prompt = False
    prompts = {"query": "Find a passage about: ", "short": "is: ", "none": ""}
    try:
        async with AsyncEmbedder(model) as embedder:
            calls = [embedder.embed(TEXTS[:4], prompt=prompt) for prompt in prompts.values()]
            found = await asyncio.gather(*calls)
        for prompt, rows in zip(prompts.values(), found, strict=True):
            assert cosines(rows, model.encode(TEXTS[:4], prompt=prompt)).min() >= 0.99999
    finally:
        pooling.include_prompt = True


class Faulty(TorchEncoder):
    """The real model on a device with little memory, and with one text it cannot stand."""

    def start(self, batch: Batch) -> Any:
        if batch.padded_tokens > 150:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if any("poison" in chunk.text for chunk in batch.chunks):
            raise IndexError("index out of range in self")
        return super().start(batch)


async def test_embed_out_of_memory_and_poison_every_waiter_is_answered_rightly(model: Any) -> None:
    texts: Sequence[str] = [text if number % 7 else f"poison {text}" for number, text in enumerate(TEXTS)]
    async with AsyncEmbedder(Faulty(model)) as embedder:
        found: list[Any] = await asyncio.gather(*map(embedder.embed, texts), return_exceptions=True)
        assert embedder.statistics().ooms > 0
        assert at_rest(embedder)
    good = [number for number, text in enumerate(texts) if "poison" not in text]
    assert cosines(np.stack([found[n] for n in good]), model.encode([texts[n] for n in good])).min() >= 0.99999
    assert {type(found[n]) for n in range(len(texts)) if n not in good} == {TextError}
