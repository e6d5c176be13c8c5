"""The adapter in LangChain's own vector store, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from asyncembed import AsyncEmbedder, AsyncEmbedError, ClosedError, OptionsError
from asyncembed.langchain import AsyncEmbedEmbeddings
from tests.fakes import FakeEncoder

from .doubles import vector

pytestmark = pytest.mark.usefixtures("no_leftovers")

NOTES = ["The heron waits in the reeds for a fish.", "Invoices are due within thirty days.", "Knead the dough twice."]


def test_search_in_a_vector_store_finds_the_nearest_without_a_loop(encoder: Any, model: Any) -> None:
    with AsyncEmbedEmbeddings(encoder) as embeddings:
        store = InMemoryVectorStore.from_texts(NOTES, embeddings)
        assert [found.page_content for found in store.similarity_search("a bird by the water", k=1)] == NOTES[:1]
        rows = embeddings.embed_documents(NOTES)
    wanted = model.encode(NOTES)
    assert np.allclose(rows, wanted, atol=1e-5)
    assert isinstance(rows[0][0], float)


async def test_search_in_a_vector_store_on_the_loop_shares_the_apps_embedder(encoder: Any) -> None:
    async with AsyncEmbedder(encoder) as embedder:
        store = InMemoryVectorStore(AsyncEmbedEmbeddings(embedder))
        await store.aadd_texts(NOTES)
        queries = ["when must I pay?", "bread", "a bird by the water"]
        found = await asyncio.gather(*(store.asimilarity_search(query, k=1) for query in queries))
        assert [documents[0].page_content for documents in found] == [NOTES[1], NOTES[2], NOTES[0]]
        assert embedder.statistics().requests == 4


async def test_asynchronous_calls_on_an_embedder_of_its_own() -> None:
    embeddings = AsyncEmbedEmbeddings(FakeEncoder())
    assert isinstance(embeddings, Embeddings)
    query, documents = await asyncio.gather(
        embeddings.aembed_query("heron"), embeddings.aembed_documents(["boat", "on the river"])
    )
    assert query == vector("heron")
    assert documents == [vector("boat"), vector("on the river")]
    assert await embeddings.aembed_documents([]) == []
    embeddings.close()
    embeddings.close()
    with pytest.raises(ClosedError):
        embeddings.embed_query("heron")


class Overtaken:
    """A lock whose first taker is overtaken by what `first` does."""

    def __init__(self, first: Callable[[], None]) -> None:
        self._first: Callable[[], None] | None = first
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        first, self._first = self._first, None
        if first is not None:
            first()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_first_call_that_a_close_overtakes_loads_no_model() -> None:
    embeddings = AsyncEmbedEmbeddings(FakeEncoder())
    embeddings._starting = Overtaken(embeddings.close)  # type: ignore[assignment]  # no other way to that moment
    try:
        with pytest.raises(ClosedError):
            embeddings.embed_query("heron")
        assert embeddings._thread is None
    finally:
        embeddings.close()


async def test_queries_and_documents_have_prompts_of_their_own() -> None:
    encoder = FakeEncoder()
    encoder.prompts = {"query": "q: ", "document": "the document: "}  # type: ignore[attr-defined]  # a model may have some
    with AsyncEmbedEmbeddings(encoder) as embeddings:
        assert embeddings.embed_query("heron") == vector("q: heron")
        assert embeddings.embed_documents(["heron"]) == [vector("the document: heron")]


async def test_synchronous_call_on_the_embedders_loop_is_refused_and_elsewhere_answered() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        embeddings = AsyncEmbedEmbeddings(embedder)
        with pytest.raises(AsyncEmbedError, match="await aembed_documents there"):
            embeddings.embed_documents(["heron"])
        assert await asyncio.to_thread(embeddings.embed_query, "heron") == vector("heron")


async def test_one_text_is_no_list_of_documents_and_a_list_no_query() -> None:
    with AsyncEmbedEmbeddings(FakeEncoder()) as embeddings:
        with pytest.raises(TypeError, match=r"a list of texts, not one text; pass \[text\]"):
            embeddings.embed_documents("abc")  # type: ignore[arg-type]  # on purpose
        with pytest.raises(TypeError, match="not one text"):
            await embeddings.aembed_documents("abc")  # type: ignore[arg-type]  # on purpose
        with pytest.raises(TypeError, match="not a dict"):
            embeddings.embed_documents({"a": 1})  # type: ignore[arg-type]  # on purpose
        for ask in (embeddings.embed_query, lambda query: asyncio.run(embeddings.aembed_query(query))):
            with pytest.raises(TypeError, match="the query is a list, not a str"):
                await asyncio.to_thread(ask, ["a"])
        assert embeddings.embed_documents(("boat",)) == [vector("boat")]  # type: ignore[arg-type]  # as good as a list


def test_options_that_cannot_be_are_refused_at_once() -> None:
    with pytest.raises(OptionsError, match="chunk_size"):
        AsyncEmbedEmbeddings(FakeEncoder(), chunk_size=0)
    with pytest.raises(TypeError, match="chunk_size cannot be given again"):
        AsyncEmbedEmbeddings(AsyncEmbedder(FakeEncoder()), chunk_size=3)


def test_model_that_cannot_be_loaded_is_an_error_of_the_call() -> None:
    embeddings = AsyncEmbedEmbeddings("./no/such/model")
    for _ in range(2):
        with pytest.raises(AsyncEmbedError, match="there is no folder"):
            embeddings.embed_query("heron")
    embeddings.close()


async def test_caller_cancelled_while_the_model_loads_leaves_it_to_the_others() -> None:
    loading, go = threading.Event(), threading.Event()

    class Slow(FakeEncoder):
        def tokenizer(self) -> Any:
            loading.set()
            assert go.wait(60)
            return super().tokenizer()

    embeddings = AsyncEmbedEmbeddings(Slow())
    first = asyncio.ensure_future(embeddings.aembed_query("gone"))
    await asyncio.to_thread(loading.wait, 60)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(embeddings.aembed_query("heron"))
    go.set()
    assert await second == vector("heron")
    await asyncio.to_thread(embeddings.close)


def test_calls_from_many_threads_share_one_embedder() -> None:
    found: list[list[float]] = []
    with AsyncEmbedEmbeddings(FakeEncoder()) as embeddings:
        threads = [threading.Thread(target=lambda: found.append(embeddings.embed_query("heron"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [vector("heron")] * 8
