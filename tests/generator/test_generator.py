"""The synchronous class gives what the stream gives, in a script and where a loop is running already."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import (
    EmbeddingGenerator,
    OptionsError,
    StoreLockedError,
    TokenLimitEstimator,
    embed_stream,
    open_embeddings,
)
from asyncembed.encoders.loading import model_folder
from asyncembed.options import DEFAULT_MODEL
from asyncembed.records import Batch
from tests.cli.running import heeding_ctrl_c
from tests.conftest import NOTES, ROOT
from tests.fakes import FakeEncoder
from tests.generator.stepping import by_steps, files

pytestmark = pytest.mark.usefixtures("no_leftovers")

TEXTS = ["one", "two words", "one", "a river " * 200, "", "数学は楽しい", "wind"]


def test_call_steps_and_stream_give_the_same(model: Any, tmp_path: Path) -> None:
    """One row a batch: then the same row meets the same arithmetic, and the files are equal to the byte."""
    settings = {"batch_size": 1, "normalize_embeddings": True}
    called = EmbeddingGenerator(model, settings, save_path=tmp_path / "call")(iter(TEXTS))
    stepped = by_steps(EmbeddingGenerator(model, settings, save_path=tmp_path / "steps"), iter(TEXTS))
    streamed = asyncio.run(_stream(model, settings, tmp_path / "stream"))
    assert files(tmp_path / "call") == files(tmp_path / "steps") == files(tmp_path / "stream")
    assert called == stepped == {text: v if v is None else v.tolist() for text, v in streamed.items()}
    assert called[""] is None
    indexes = [(tmp_path / name / "embeddings_index.json").read_bytes() for name in ("call", "steps", "stream")]
    assert indexes[0] == indexes[1] == indexes[2]


async def _stream(model: Any, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return await embed_stream(TEXTS, model=model, save_path=folder, **settings)


def test_example_file_gives_the_vectors_of_encode(model: Any, tmp_path: Path) -> None:
    with NOTES.open(encoding="utf-8", newline="") as file:
        texts = [row[0] for row in csv.reader(file)][:60]
    found = EmbeddingGenerator(model, save_path=tmp_path)(text for text in texts)
    short = [text for text in dict.fromkeys(texts) if len(text) < 600]
    expected = model.encode(short)
    ours = np.array([found[text] for text in short])
    cosines = np.sum(ours * expected, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.99999


async def test_works_where_a_loop_is_running(model: Any) -> None:
    """As in a notebook: the call blocks this loop, and runs on one of its own."""
    assert set(EmbeddingGenerator(model, save_path=None)(["in a notebook"])) == {"in a notebook"}


def test_iterator_is_pulled_in_the_calling_thread(model: Any) -> None:
    """A sqlite cursor refuses any other thread."""
    with sqlite3.connect(":memory:") as database:
        database.execute("create table notes (text)")
        database.executemany("insert into notes values (?)", [(f"note {i}",) for i in range(20)])
        cursor = database.execute("select text from notes")
        assert len(EmbeddingGenerator(model, save_path=None)(row[0] for row in cursor)) == 20
    database.close()


def test_error_of_the_iterator_comes_out_unchanged_and_what_was_before_is_saved(model: Any, tmp_path: Path) -> None:
    boom = LookupError("gone")

    def failing() -> Iterator[str]:
        yield "kept"
        raise boom

    with pytest.raises(LookupError) as caught:
        EmbeddingGenerator(model, save_path=tmp_path)(failing())
    assert caught.value is boom
    assert len(files(tmp_path)) == 1


def test_error_of_the_job_stops_the_pulling(tmp_path: Path) -> None:
    """An endless iterator is left as soon as the job cannot go on."""

    def dead(batch: Batch) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def endless() -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"text {number}"

    with pytest.raises(Exception, match="device-side assert"):
        EmbeddingGenerator(FakeEncoder(on_batch=dead), save_path=tmp_path)(endless())


def test_folder_is_locked_only_during_a_job(model: Any, tmp_path: Path) -> None:
    first, second = (EmbeddingGenerator(model, save_path=tmp_path) for _ in range(2))
    first(["a"])
    second(["b"])
    iterator = iter(["c", "d"])
    first.fill_texts(iterator)
    with pytest.raises(StoreLockedError):
        second(["e"])
    first.close()
    assert set(second(["e"])) == {"e"}


def test_attributes_can_be_read_and_replaced(model: Any, tmp_path: Path) -> None:
    from langchain_text_splitters import RecursiveCharacterTextSplitter
    from tqdm import tqdm

    generator = EmbeddingGenerator(model, save_path=tmp_path, max_memory_usage=50_000_000)
    assert generator.max_memory_usage == 50_000_000
    assert generator.token_counter("two words") == 2
    assert generator.text_splitter.split_text("short") == ["short"]
    assert generator.limit_estimator() >= 1

    generator.text_splitter = RecursiveCharacterTextSplitter(
        chunk_size=20, chunk_overlap=5, length_function=generator.token_counter
    )
    generator.limit_estimator = TokenLimitEstimator(initial_limit=64)
    generator.progress_bar = tqdm(disable=True)
    generator.max_memory_usage = 20_000_000
    text = "a boat on the river. " * 20
    assert generator([text])[text] is not None
    chunks = open_embeddings(tmp_path)[text].chunks
    assert len(chunks) > 5
    assert max(chunk.n_tokens for chunk in chunks) <= 20


def test_own_token_counter_is_what_the_default_splitter_counts_with(model: Any, tmp_path: Path) -> None:
    generator = EmbeddingGenerator(model, save_path=tmp_path)
    generator.token_counter = lambda text: 2 * len(text.split())
    text = "boat " * 200  # 400 by this counter, 200 by the model's
    generator([text])
    assert len(open_embeddings(tmp_path)[text].chunks) == 2


def test_progress_bar_counts_every_text(model: Any) -> None:
    from tqdm import tqdm

    generator = EmbeddingGenerator(model, save_path=None)
    with tqdm(file=io.StringIO()) as generator.progress_bar:
        generator(["a", "b", "a"])
        generator(["c"])
        assert generator.progress_bar.n == 4
        by_steps(generator, iter(["a", "b", "a", 5]))
        assert generator.progress_bar.n == 8


def test_out_of_memory_by_steps_lowers_the_limit_and_loses_nothing(tmp_path: Path) -> None:
    def small(batch: Batch) -> None:
        if batch.padded_tokens > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    generator = EmbeddingGenerator(FakeEncoder(on_batch=small), save_path=tmp_path)
    texts = [f"text number {i} " + "word " * (i % 30) for i in range(200)]
    found = by_steps(generator, iter(texts))
    assert all(found[text] is not None for text in texts)
    assert generator.limit_estimator() <= 100


def test_limit_that_a_call_learnt_can_be_read_and_is_kept_for_the_next(tmp_path: Path) -> None:
    def small(batch: Batch) -> None:
        if batch.padded_tokens > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    generator = EmbeddingGenerator(FakeEncoder(on_batch=small), save_path=tmp_path)
    generator([f"text number {i}" for i in range(200)])
    learnt = generator.limit_estimator
    assert isinstance(learnt, TokenLimitEstimator)
    assert learnt.failed_at is not None
    generator(["and another"])
    assert generator.limit_estimator is learnt


def test_model_given_by_name_is_loaded_once(tmp_path: Path) -> None:
    """Its folder may even be gone."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder(DEFAULT_MODEL) or "", folder, copy_function=os.symlink)
    generator = EmbeddingGenerator(str(folder), {"device": "cpu"}, save_path=tmp_path / "data")
    generator(["first"])
    shutil.rmtree(folder)
    assert set(generator(["second"])) == {"second"}
    assert set(by_steps(generator, iter(["third"]))) == {"third"}


def test_locked_folder_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with EmbeddingGenerator(FakeEncoder(), save_path=tmp_path) as holder:
        holder.fill_texts(iter(["a"]))
        other = EmbeddingGenerator(str(tmp_path / "no such model"), save_path=tmp_path)
        with pytest.raises(StoreLockedError):
            other(["b"])


def test_precision_of_the_folder_is_taken_over_by_call_and_steps(tmp_path: Path) -> None:
    """Also where the model was loaded before the folder was looked at."""
    settings: dict[str, Any] = {"model": DEFAULT_MODEL, "device": "cpu", "dtype": "bfloat16"}
    asyncio.run(_embed(["first"], save_path=tmp_path, **settings))
    generator = EmbeddingGenerator(DEFAULT_MODEL, {"device": "cpu"}, save_path=tmp_path)
    assert generator.token_counter("two words") == 2
    by_steps(generator, iter(["second"]))
    again = EmbeddingGenerator(DEFAULT_MODEL, {"device": "cpu"}, save_path=tmp_path)
    assert again.token_counter("two words") == 2
    again(["third"])
    assert len(open_embeddings(tmp_path)) == 3


async def _embed(texts: list[str], **options: Any) -> None:
    await embed_stream(texts, **options)


def test_memory_budget_holds_back_filling() -> None:
    generator = EmbeddingGenerator(FakeEncoder(), save_path=None, max_memory_usage=20_000)
    iterator = iter([f"text {i}" for i in range(1000)])
    n_first = generator.fill_texts(iterator)
    assert 0 < n_first < 20
    assert generator.fill_texts(iterator) == 0
    assert len(by_steps(generator, iterator)) == 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batchsize": 3}, "unknown setting 'batchsize'"),
        ({"precision": "int8"}, "precision='int8' is not supported"),
        ({"output_value": "token_embeddings"}, "output_value='token_embeddings'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_setting_that_cannot_be_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        EmbeddingGenerator("all-MiniLM-L6-v2", settings)


_INTERRUPTED = """
import sys
from asyncembed import EmbeddingGenerator

def texts():
    number = 0
    while True:
        number += 1
        if number == 300:
            print("under way", flush=True)
        yield f"text number {number}"

try:
    EmbeddingGenerator("all-MiniLM-L6-v2", save_path=sys.argv[1])(texts())
except KeyboardInterrupt:
    import threading
    print([t.name for t in threading.enumerate() if t.name.startswith("asyncembed")], flush=True)
"""


def test_ctrl_c_cancels_the_job_and_is_raised_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path)]
    with heeding_ctrl_c():
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "under way"
        os.kill(child.pid, signal.SIGINT)
        assert child.stdout.readline().strip() == "[]"
        assert child.wait(60) == 0


def test_single_str_is_refused_and_not_taken_for_its_letters() -> None:
    with pytest.raises(OptionsError, match="one text"):
        EmbeddingGenerator(FakeEncoder(), save_path=None)("not a list")


def test_call_with_a_source_that_counts_tokens_loads_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job loads it in a thread of its own, while the source may ask for it in the caller's."""
    from asyncembed.job import loading

    load, loads = loading.load_encoder, list[str]()

    def counted(*arguments: Any, **options: Any) -> Any:
        loads.append(threading.current_thread().name)
        return load(*arguments, **options)

    monkeypatch.setattr(loading, "load_encoder", counted)
    generator = EmbeddingGenerator(DEFAULT_MODEL, save_path=None)
    found = generator(text for text in ("one", "two", "three four") if generator.token_counter(text) < 500)
    assert len(found) == 3
    assert len(loads) == 1
