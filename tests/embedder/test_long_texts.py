"""A text of megabytes holds nobody up: it is tokenised beside the others, and no longer than somebody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import AsyncEmbedder
from asyncembed.encoders import Tokenized
from asyncembed.encoders.torch_encoder import TorchEncoder
from asyncembed.engine.client import CALL_CHARS

pytestmark = pytest.mark.usefixtures("no_leftovers")

LONG = "the boat left the harbour before the storm. " * 10_000


class Gated:
    """The real tokenizer, which waits at a gate before each long section."""

    def __init__(self, tokenizer: Any, encoder: GatedEncoder) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        if any(len(text) > 10_000 for text in texts):
            self._encoder.n_sections += 1
            self._encoder.begun.set()
            assert self._encoder.gate.wait(60)
        found: list[Tokenized] = self._tokenizer.tokenize(texts)
        return found

    def spans(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = self._tokenizer.spans(text)
        return spans


class GatedEncoder(TorchEncoder):
    """The real model; long sections are only tokenised when the gate is open."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.begun, self.gate = threading.Event(), threading.Event()
        self.n_sections = 0

    def tokenizer(self) -> Any:
        return Gated(super().tokenizer(), self)


async def test_embed_short_text_does_not_wait_for_a_long_one(model: Any) -> None:
    encoder = GatedEncoder(model)
    text = LONG[: CALL_CHARS + 1000]
    async with AsyncEmbedder(encoder) as embedder:
        long = asyncio.create_task(embedder.embed(text, priority="bulk"))
        await asyncio.to_thread(encoder.begun.wait)
        assert (await embedder.embed("a heron on the river")).shape == (384,)
        assert not long.done()
        encoder.gate.set()
        vector = await long
    async with AsyncEmbedder(model) as embedder:
        cosine = vector @ await embedder.embed(text) / np.linalg.norm(vector) ** 2
    assert cosine == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_embed_long_text_that_nobody_waits_for_is_given_up_at_its_next_section(model: Any, how: str) -> None:
    encoder = GatedEncoder(model)
    async with AsyncEmbedder(encoder) as embedder:
        long = asyncio.create_task(embedder.embed(LONG))
        await asyncio.to_thread(encoder.begun.wait)
        closing = None
        if how == "cancelled":
            long.cancel()
        else:
            closing = asyncio.create_task(embedder.aclose(drain=False))
        await asyncio.wait([long])
        encoder.gate.set()
        if closing is not None:
            await closing
        else:
            assert (await embedder.embed("a heron on the river")).shape == (384,)
    assert encoder.n_sections <= 2
