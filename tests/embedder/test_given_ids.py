"""Texts given as token ids: the model sees them as they are, checked against the texts they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncembed import AsyncEmbedder, OverloadedError, TextError, TextTypeError, TokenText
from tests.core.minilm import fast_tokenizer
from tests.fakes import FakeEncoder

from .doubles import held_model

pytestmark = pytest.mark.usefixtures("no_leftovers")

TEXTS = ["a heron on the river", "a boat", "unbelievably long-winded words, e.g. antidisestablishmentarianism"]


def ids_of(text: str, *, whole: bool = False) -> list[int]:
    found = fast_tokenizer().tokenize([text])[0]
    ids = found.ids.tolist()
    return ids if whole else ids[found.n_prefix : len(ids) - found.n_suffix]


@pytest.mark.parametrize("whole", [False, True])
async def test_ids_with_or_without_special_tokens_give_the_vector_of_their_text(encoder: Any, whole: bool) -> None:
    async with AsyncEmbedder(encoder) as embedder:
        expected = await embedder.embed(TEXTS)
        given_ids = [TokenText.of(ids_of(text, whole=whole)) for text in TEXTS]
        found = await embedder.embed_counted_nowait([*given_ids, TEXTS[0]])
    np.testing.assert_allclose(found.vectors, [*expected, expected[0]], atol=1e-5)
    assert found.n_tokens == [*(len(ids_of(text)) for text in TEXTS), len(ids_of(TEXTS[0]))]


async def test_ids_of_a_prompted_embedder_stand_behind_the_prompt(encoder: Any) -> None:
    async with AsyncEmbedder(encoder, prompt="query: ") as embedder:
        expected = await embedder.embed(TEXTS[0])
        found = await embedder.embed_counted_nowait([TokenText.of(ids_of(TEXTS[0]))])
    np.testing.assert_allclose(found.vectors[0], expected, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 30522, 2**31 - 1])
async def test_id_outside_the_vocabulary_is_named(encoder: Any, bad: int) -> None:
    async with AsyncEmbedder(encoder) as embedder:
        with pytest.raises(TextError, match=f"token id {bad} is not in the model's vocabulary of 30522") as caught:
            await embedder.embed_counted_nowait(["fine", TokenText.of([1037, bad])])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("ids", "reason"), [([], "has no tokens"), ([101, 102], "no tokens"), ([100, 100], "knows none of")]
)
async def test_ids_that_say_nothing_are_refused(encoder: Any, ids: list[int], reason: str) -> None:
    async with AsyncEmbedder(encoder) as embedder:
        with pytest.raises(TextError, match=reason):
            await embedder.embed_counted_nowait([TokenText.of(ids)])


async def test_ids_where_the_tokenizer_does_not_know_them_are_refused() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        with pytest.raises(TextError, match="does not say what token ids mean"):
            await embedder.embed_counted_nowait([TokenText.of([1])])


async def test_item_that_is_neither_text_nor_ids_is_refused() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        with pytest.raises(TextTypeError, match="item 1 is an int, not a str or TokenText"):
            embedder.embed_counted_nowait(["a", 3])  # type: ignore[list-item]  # the mistake in question


async def test_same_ids_in_flight_are_computed_once(encoder: Any) -> None:
    async with AsyncEmbedder(encoder, cache_bytes=2**20) as embedder:
        one, two = (TokenText.of(ids_of(TEXTS[0])) for _ in range(2))
        await embedder.embed_counted_nowait([one, two])
        await embedder.embed_counted_nowait([two])
        assert embedder.statistics().cache_hits == 1
        assert embedder.statistics().row_tokens == len(ids_of(TEXTS[0], whole=True))


async def test_list_too_large_for_the_whole_room_says_that_it_will_never_fit() -> None:
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder, max_pending_bytes=20_000) as embedder:
        with pytest.raises(OverloadedError) as never:
            embedder.embed_nowait([f"word {number}" for number in range(20)])
        assert not never.value.can_fit
        held = [embedder.embed_nowait(f"word {number}") for number in range(6)]
        with pytest.raises(OverloadedError) as later:
            embedder.embed_nowait("one more word")
        assert later.value.can_fit
        gate.let_go(6)
        assert len([await vector for vector in held]) == 6
