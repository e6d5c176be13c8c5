"""Scripts for `encode` and the users' manual of the classic class, as people write them."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import EmbeddingGenerator, ModelError, OptionsError, TokenLimitEstimator, open_embeddings
from asyncembed.records import Batch
from tests.fakes import FakeEncoder
from tests.generator.stepping import by_steps, contents

TEXTS = ["This is the first text.", "Here's the second text."]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


MANUAL = """
from asyncembed import EmbeddingGenerator
model_settings = {
    'convert_to_tensor': True,
    'device': 'cpu',
    'show_progress_bar': False
}
embedding_generator = EmbeddingGenerator(model, model_settings, save_path='data')
texts = iter([
    "This is the first text.",
    "Here's the second text.",
])
embeddings = embedding_generator(texts)
print(embeddings)
"""


def test_manuals_first_example_prints_lists_of_floats(model: Any, here: Path) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(MANUAL, {"model": model})
    found = eval(printed.getvalue())
    assert list(found) == TEXTS
    assert {type(number) for vector in found.values() for number in vector} == {float}
    assert np.allclose(list(found.values()), model.encode(TEXTS), atol=1e-5)
    assert len(list((here / "data" / "embeddings_data").glob("*.json"))) == 2


def test_manuals_ways_to_customise_work_as_written(model: Any, here: Path) -> None:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    model_settings = {"convert_to_tensor": True, "device": "cpu", "show_progress_bar": False, "batch_size": 64}
    embedding_generator = EmbeddingGenerator(model, model_settings)
    embedding_generator.text_splitter = RecursiveCharacterTextSplitter(
        chunk_size=1024, chunk_overlap=20, length_function=embedding_generator.token_counter
    )
    embedding_generator.limit_estimator = TokenLimitEstimator(initial_limit=2048)
    assert embedding_generator.progress_bar.n == 0
    long = "A boat lies at the mooring. " * 100
    assert embedding_generator(iter([*TEXTS, long]))[long] is not None
    chunks = open_embeddings(here / "data")[long].chunks
    assert max(chunk.n_tokens for chunk in chunks) <= 254


@pytest.mark.parametrize(
    "settings",
    [
        {"convert_to_tensor": True},
        {"convert_to_tensor": "yes", "convert_to_numpy": None, "show_progress_bar": 0},
        {"convert_to_numpy": False, "num_workers": 4, "pool": {"processes": []}, "chunk_size": 5},
        {"output_value": "sentence_embedding", "precision": None, "is_pretokenized": False, "processing_kwargs": None},
        {"normalize_embeddings": 1, "batch_size": np.int64(7), "device": ["cpu"], "truncate_dim": None},
        {"sentences": None, "inputs": None, "device": None, "prompt": None, "prompt_name": None, "task": None},
    ],
)
def test_setting_that_leaves_the_meaning_alone_is_taken(model: Any, settings: dict[str, Any]) -> None:
    found = EmbeddingGenerator(model, settings, save_path=None)(TEXTS)
    assert np.allclose(list(found.values()), model.encode(TEXTS), atol=1e-5)
    assert isinstance(found[TEXTS[0]], list)


def test_device_of_torch_is_taken(model: Any) -> None:
    import torch

    found = EmbeddingGenerator(model, {"device": torch.device("cpu")}, save_path=None)(TEXTS)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"output_value": "token_embeddings"}, "output_value='token_embeddings' is not supported"),
        ({"output_value": None}, "output_value=None is not supported"),
        ({"precision": "int8"}, "precision='int8' is not supported"),
        ({"device": ["cpu", "cuda"]}, "names several"),
        ({"sentences": ["a"]}, "'sentences' are given when the generator is called"),
        ({"is_pretokenized": True}, "is_pretokenized=True is not supported"),
        ({"convert_to_tensors": True}, "unknown setting 'convert_to_tensors'"),
    ],
)
def test_setting_that_changes_the_meaning_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        EmbeddingGenerator(FakeEncoder(), settings)


def test_folder_in_the_place_of_the_settings_is_refused_by_name() -> None:
    with pytest.raises(OptionsError, match=r"model_settings must hold .* by name.*'data'"):
        EmbeddingGenerator(FakeEncoder(), "data")  # type: ignore[arg-type]  # as people write it


def test_every_argument_of_the_installed_encode_is_known() -> None:
    from sentence_transformers import SentenceTransformer

    parameters = inspect.signature(SentenceTransformer.encode).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in ("self", "inputs", "kwargs") and parameter.default is not inspect.Parameter.empty
    }
    assert EmbeddingGenerator(FakeEncoder(), defaults, save_path=None)(["one"])["one"] is not None


def test_steps_hand_out_the_same_chunks_until_they_are_embedded() -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=None)
    generator.fill_texts(iter(["one", "two", "six"]))
    chunks = generator.find_best_chunks()
    assert generator.find_best_chunks() == chunks
    generator.embed(chunks[:1])
    assert generator.find_best_chunks() == chunks[1:]
    generator.fail(chunks[1:], ValueError("not this time"))
    assert set(generator.find_best_chunks()) < set(chunks[1:])


def test_steps_without_succeed_give_the_files_of_the_call(tmp_path: Path) -> None:
    items = [*map(str, range(60)), "word " * 200, "", 5, "3"]
    called = EmbeddingGenerator(FakeEncoder(), save_path=tmp_path / "call")(iter(items))
    generator, iterator = EmbeddingGenerator(FakeEncoder(), save_path=tmp_path / "steps"), iter(items)
    while generator.fill_texts(iterator) or generator.n_waiting:
        generator.embed(generator.find_best_chunks())
        generator.save_data()
        generator.remove_completed_texts()
    assert generator.load_average_embeddings_with_fallback() == called
    assert contents(tmp_path / "call") == contents(tmp_path / "steps")


def test_steps_vectors_made_elsewhere_are_recorded_and_embedded_twice_changes_nothing() -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=None)
    generator.fill_texts(iter(["one", "two"]))
    chunks = generator.find_best_chunks()
    with pytest.raises(OptionsError, match="call `embed` before"):
        generator.succeed(chunks)
    with pytest.raises(OptionsError, match="shape"):
        generator.succeed(chunks, np.ones((3, 4), np.float32))
    generator.succeed(chunks[:1], np.full((1, 4), 7, np.float32))
    first, again = generator.embed(chunks), generator.embed(chunks)
    assert np.array_equal(first, again)
    generator.succeed(chunks, first)
    first += 1
    with pytest.raises(OptionsError, match="has recorded other vectors"):
        generator.succeed(chunks, first)
    generator.save_data()
    found = generator.load_average_embeddings_with_fallback()
    assert found[chunks[0].text] == [7.0] * 4
    assert found[chunks[1].text] == again[1].tolist()


def refusing(is_bad: Any) -> FakeEncoder:
    def refuse(batch: Batch) -> None:
        if any(is_bad(chunk.text) for chunk in batch.chunks):
            raise ValueError("cannot take this")

    return FakeEncoder(on_batch=refuse)


def test_steps_bad_texts_in_a_row_fail_alone_as_in_the_call(tmp_path: Path) -> None:
    items = [*map(str, range(40)), *(f"poison{number}" for number in range(40)), "last"]
    found = []
    for name, run in (("call", lambda generator: generator(iter(items))), ("steps", _by_steps(items))):
        found.append(run(EmbeddingGenerator(refusing(lambda text: "poison" in text), save_path=tmp_path / name)))
    assert found[0] == found[1]
    assert sum(vector is None for vector in found[0].values()) == 40
    assert contents(tmp_path / "call") == contents(tmp_path / "steps")


def test_steps_model_that_fails_on_all_is_a_model_error_as_in_the_call() -> None:
    items = [f"text {number}" for number in range(40)]
    for run in (lambda generator: generator(iter(items)), _by_steps(items)):
        with pytest.raises(ModelError, match="failed on 16 chunks in a row"):
            run(EmbeddingGenerator(refusing(lambda text: True), save_path=None))


def test_steps_other_chunks_of_a_failed_text_are_not_tried_again() -> None:
    seen: list[str] = []

    def refuse(batch: Batch) -> None:
        seen.extend(chunk.text for chunk in batch.chunks if len(batch.chunks) == 1)
        if any("poison" in chunk.text for chunk in batch.chunks):
            raise ValueError("cannot take this")

    generator = EmbeddingGenerator(FakeEncoder(on_batch=refuse), save_path=None)
    assert by_steps(generator, iter(["poison " * 300, "one"]))["one"] is not None
    assert sum("poison" in text for text in seen) == 1


def _by_steps(items: list[str]) -> Any:
    def run(generator: EmbeddingGenerator) -> dict[str, list[float] | None]:
        iterator: Iterator[str] = iter(items)
        return by_steps(generator, iterator)

    return run
