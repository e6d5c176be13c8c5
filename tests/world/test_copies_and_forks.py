"""Generators and adapters that are copied, pickled, or used beside a fork: the recipe travels, no loaded model does."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_text_splitters import RecursiveCharacterTextSplitter

from asyncembed import AsyncEmbedder, EmbeddingGenerator, TokenLimitEstimator, open_embeddings
from asyncembed.langchain import AsyncEmbedEmbeddings
from tests.conftest import ROOT
from tests.fakes import FakeEncoder

WAYS: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]


@pytest.mark.parametrize("travel", WAYS)
def test_used_generator_travels_and_works_on_its_own(travel: Callable[[Any], Any], tmp_path: Path) -> None:
    generator = EmbeddingGenerator(FakeEncoder(), {"normalize_embeddings": True}, save_path=tmp_path)
    generator.limit_estimator = TokenLimitEstimator(initial_limit=77)
    generator.text_splitter = RecursiveCharacterTextSplitter(
        chunk_size=10, chunk_overlap=0, length_function=generator.token_counter
    )
    text = "word " * 30
    before = generator([text])
    generator.fill_texts(iter(["in the midst of a run by steps"]))
    made = travel(generator)
    generator.close()
    assert made([text]) == before
    assert made.progress_bar is not generator.progress_bar
    assert made.fill_texts(iter(["another"])) == 1
    made.close()
    assert len(open_embeddings(tmp_path)[text].chunks) == 3


@pytest.mark.parametrize("travel", WAYS)
def test_used_adapter_travels_and_has_a_thread_of_its_own(travel: Callable[[Any], Any]) -> None:
    with AsyncEmbedEmbeddings(FakeEncoder(), query_prompt="find ") as embeddings:
        query = embeddings.embed_query("heron")
        made = travel(embeddings)
        assert made.embed_query("heron") == query
    assert made.embed_query("heron") == query  # the other is closed
    made.close()


async def test_adapter_on_an_embedder_that_is_given_shares_it_with_its_copies() -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        embeddings = AsyncEmbedEmbeddings(embedder)
        for travel in WAYS[:2]:
            assert await travel(embeddings).aembed_query("heron") == await embeddings.aembed_query("heron")
        with pytest.raises(TypeError, match="cannot be copied or pickled: make one of the same model"):
            pickle.dumps(embeddings)


FORKED = """
import os, signal, sys
from asyncembed import EmbeddingGenerator
from asyncembed.langchain import AsyncEmbedEmbeddings

generator = EmbeddingGenerator("all-MiniLM-L6-v2", {"device": "cpu"}, save_path=sys.argv[1])
embeddings = AsyncEmbedEmbeddings(device="cpu")
texts = [f"a heron on river {number}" for number in range(20)]
generator(texts)
query = embeddings.embed_query(texts[0])
generator.fill_texts(iter(["the parent is in the midst of a run by steps"]))
child = os.fork()
if not child:
    signal.alarm(60)  # whoever waits for ever ends all the same
    other = EmbeddingGenerator("all-MiniLM-L6-v2", {"device": "cpu"}, save_path=sys.argv[1])
    for one in (generator, other):
        try:
            one(texts)
        except Exception as error:
            print(type(error).__name__, flush=True)
    generator._options = type(generator._options)(save_path=None, device="cpu")
    print(len(generator(texts)), abs(embeddings.embed_query(texts[0])[0] - query[0]) < 1e-5, flush=True)
    embeddings.close()
    os._exit(0)
print(os.waitpid(child, 0)[1], generator.n_waiting, flush=True)
generator.embed(generator.find_best_chunks())
generator.save_data()
print(len(generator.load_average_embeddings_with_fallback()), len(embeddings.embed_query("a")), flush=True)
embeddings.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_generator_and_adapter_used_before_a_fork_load_anew_in_the_child(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    said = done.stdout.splitlines()
    assert (done.returncode, said[:2]) == (0, ["StoreLockedError"] * 2), done.stderr
    assert said[2:] == ["20 True", "0 1", "1 384"]
