"""Prompts of queries, documents and blank texts: an embedder and LangChain's adapter give what `encode` gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from asyncembed import AsyncEmbedder, OptionsError, TextError, embed_stream, load_encoder
from asyncembed.langchain import AsyncEmbedEmbeddings
from asyncembed.options import EmbedOptions
from tests.fakes import FakeEncoder

TEXT = "a heron on the river"


@pytest.fixture
def prompted(model: Any) -> Iterator[Any]:
    """The real model with prompts of its own: one for queries, an empty one for documents as every model has it."""
    before = dict(model.prompts)
    model.prompts.update({"query": "find: ", "document": "", "title": "a title: "})
    yield model
    model.prompts.clear()
    model.prompts.update(before)


def near(found: Any, wanted: Any) -> bool:
    return bool(np.allclose(found, wanted, atol=1e-5))


async def test_embedder_explicit_prompt_holds_where_the_models_own_is_empty(prompted: Any) -> None:
    async with AsyncEmbedder(prompted, prompt="passage: ") as embedder:
        document, query = await asyncio.gather(embedder.embed_document(TEXT), embedder.embed_query(TEXT))
    async with AsyncEmbedder(prompted, prompt_name="title") as embedder:
        title = await embedder.embed_document(TEXT)
    assert near(document, prompted.encode(TEXT, prompt="passage: "))
    assert near(query, prompted.encode_query(TEXT))
    assert near(title, prompted.encode(TEXT, prompt_name="title"))
    assert not near(document, title)


async def test_embedder_without_an_explicit_prompt_gives_what_encode_document_gives(prompted: Any) -> None:
    prompted.default_prompt_name = "title"
    try:
        async with AsyncEmbedder(prompted) as embedder:
            document, text = await asyncio.gather(embedder.embed_document(TEXT), embedder.embed(TEXT))
        assert near(document, prompted.encode_document(TEXT))
        assert near(text, prompted.encode(TEXT))
        assert not near(document, text)
    finally:
        prompted.default_prompt_name = None


async def test_embedder_prompts_of_a_kind_win_over_the_models_and_a_calls_own_over_all(prompted: Any) -> None:
    options = {"query_prompt": "q: ", "document_prompt": "", "prompt": "never: "}
    async with AsyncEmbedder(prompted, **options) as embedder:
        query = await embedder.embed_query(TEXT)
        record = (await embedder.embed_records([TEXT], kind="document"))[0]
        named = await embedder.embed_nowait(TEXT, kind="query", prompt_name="title")
        counted = await embedder.embed_counted_nowait([TEXT], kind="query", prompt="last: ")
    assert near(query, prompted.encode(TEXT, prompt="q: "))
    assert near(record.embedding, prompted.encode(TEXT, prompt=""))
    assert near(named, prompted.encode(TEXT, prompt_name="title"))
    assert near(counted.vectors[0], prompted.encode(TEXT, prompt="last: "))


async def test_embedder_prompt_given_with_the_encoder_holds_for_documents(prompted: Any) -> None:
    async with AsyncEmbedder(load_encoder(EmbedOptions(model=prompted, prompt="passage: "))) as embedder:
        assert near(await embedder.embed_document(TEXT), prompted.encode(TEXT, prompt="passage: "))


async def test_job_prompt_of_an_encoder_is_not_dropped(encoder: Any, model: Any) -> None:
    found = await embed_stream([TEXT], model=encoder, prompt="passage: ", save_path=None)
    assert near(found[TEXT], model.encode(TEXT, prompt="passage: "))


def test_langchain_explicit_prompts_hold(prompted: Any) -> None:
    with AsyncEmbedEmbeddings(prompted, prompt="passage: ") as embeddings:
        assert near(embeddings.embed_documents([TEXT])[0], prompted.encode(TEXT, prompt="passage: "))
        assert near(embeddings.embed_query(TEXT), prompted.encode_query(TEXT))


async def test_langchain_prompts_of_a_kind_hold_on_an_embedder_that_is_given(prompted: Any) -> None:
    async with AsyncEmbedder(prompted) as embedder:
        embeddings = AsyncEmbedEmbeddings(embedder, query_prompt="q: ", document_prompt="d: ")
        query, (document,) = await asyncio.gather(embeddings.aembed_query(TEXT), embeddings.aembed_documents([TEXT]))
    assert near(query, prompted.encode(TEXT, prompt="q: "))
    assert near(document, prompted.encode(TEXT, prompt="d: "))


@pytest.mark.parametrize("how", [{"kind": "passage"}, {"kind": None}, {"task": 3}, {"blanks": "skip"}])
async def test_embed_argument_that_cannot_be_is_refused_by_name(how: dict[str, Any]) -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        with pytest.raises(OptionsError, match=next(iter(how))):
            await embedder.embed(TEXT, **how)
        with pytest.raises(OptionsError, match=next(iter(how))):
            embedder.embed_counted_nowait([TEXT], **how)


@pytest.mark.parametrize("name", ["query_prompt", "document_prompt"])
def test_prompt_of_a_kind_that_is_no_text_is_refused_at_once(name: str) -> None:
    for make in (AsyncEmbedder, AsyncEmbedEmbeddings):
        with pytest.raises(OptionsError, match="must be text"):
            make(FakeEncoder(), **{name: ["x"]})


BLANKS = ["", " ", "\n\t\x0c", "\u200b", " " * 70_000]


def test_langchain_blank_pages_get_what_encode_gives_them(model: Any) -> None:
    with AsyncEmbedEmbeddings(model, document_prompt="page: ") as embeddings:
        found = embeddings.embed_documents([TEXT, *BLANKS])
        query = embeddings.embed_query("")
    assert near(found, model.encode([TEXT, *BLANKS], prompt="page: "))
    assert near(query, model.encode(""))


async def test_embedder_blank_text_is_an_error_unless_encode_is_asked_for(model: Any) -> None:
    async with AsyncEmbedder(model, cache_bytes="1MB") as embedder:
        calls = [
            embedder.embed(" ", blanks="encode"),
            embedder.embed([TEXT, " "]),
            embedder.embed(" ", blanks="encode"),
        ]
        found: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        counted = await embedder.embed_counted_nowait([" "], blanks="encode")
        with pytest.raises(TextError, match="the text has no tokens"):
            await embedder.embed(" ")
    assert isinstance(found[1], TextError)
    assert found[1].index == 1
    assert near(found[0], model.encode(" "))
    assert near(found[2], found[0])
    assert counted.n_tokens == [0]


def test_langchain_blank_page_that_becomes_zeros_is_an_error() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"heron": 0, "boat": 1}, unk_token="boat"))
    tokenizer.pre_tokenizer = Whitespace()
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    with AsyncEmbedEmbeddings(static) as embeddings:
        assert near(embeddings.embed_documents(["heron"]), static.encode(["heron"]))
        with pytest.raises(TextError, match="the text has no tokens"):
            embeddings.embed_documents(["heron", ""])
