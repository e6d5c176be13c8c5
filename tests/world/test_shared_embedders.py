"""An embedder that jobs, other loops and other processes share."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import anyio
import numpy as np
import pytest

from asyncembed import AsyncEmbedder, OptionsError, TextError, embed_stream
from tests.world.test_tasks import LONG, TEXTS, router

OPTIONS: list[dict[str, Any]] = [
    {"truncate_dim": 8},
    {"normalize_embeddings": True},
    {"task": "query"},
    {"chunk_size": 5, "long_texts": "truncate"},
    {"prompt": "heron "},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_job_on_an_embedder_takes_over_its_options(options: dict[str, Any]) -> None:
    """It gives the vectors that the embedder gives, unless it names an option itself."""
    texts = [*TEXTS, LONG]
    async with AsyncEmbedder(router(default_route="document"), **options) as embedder:
        asked = await embedder.embed(texts)
        found = await embed_stream(texts, embedder=embedder, save_path=None)
        own = await embed_stream(texts, embedder=embedder, save_path=None, truncate_dim=4)
    assert np.allclose(asked, np.stack([found[text] for text in texts]), atol=1e-6)
    assert {vector.shape for vector in own.values() if vector is not None} == {(4,)}


@pytest.mark.parametrize("drain", [True, False])
async def test_embedder_closed_from_another_loop_is_closed(drain: bool) -> None:
    embedder = AsyncEmbedder(router(default_route="document"))
    with anyio.fail_after(60):
        async with embedder:
            await asyncio.to_thread(lambda: asyncio.run(embedder.aclose(drain=drain)))
            assert embedder.statistics().state == "closed"


def test_text_error_reaches_another_process_as_it_is() -> None:
    error = TextError(3, "a text of some length " * 9, "it is too long")
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.index, found.reason) == (TextError, str(error), 3, "it is too long")


@pytest.mark.parametrize("options", [{"model": None}, {"model": 3}, {"prompt": "a\ud800"}], ids=str)
async def test_options_that_cannot_be_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionsError, match=f"^{name}="):
        await embed_stream(["a"], save_path=None, **options)
    with pytest.raises(OptionsError, match=f"^{name}="):
        AsyncEmbedder(**options)


async def test_call_prompt_with_half_a_character_blames_no_text() -> None:
    async with AsyncEmbedder(router(default_route="document")) as embedder:
        with pytest.raises(OptionsError, match="half a surrogate pair"):
            await embedder.embed("a heron", prompt="a\ud800")
        with pytest.raises(TypeError, match="'promt' is no argument of this call; there are kind, prompt,"):
            await embedder.embed("a heron", promt="a")  # type: ignore[call-overload]  # what it is about
