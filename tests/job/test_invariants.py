"""The invariants of a job, each with a test that fails without the code that keeps it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncembed import Text, embed_stream, open_embeddings
from asyncembed.errors import ModelError
from asyncembed.records import Batch
from tests.conftest import ROOT
from tests.fakes import FakeEncoder, WordTokenizer

pytestmark = pytest.mark.usefixtures("no_leftovers")

words = st.sampled_from(["a", "bee", "ceiling", "door", "POISON", "HUGE"])
some_texts = st.one_of(
    st.lists(words, min_size=1, max_size=150).map(" ".join), st.just(""), st.just("a\ud800"), st.integers()
)


def temperamental(batch: Batch) -> None:
    """Raises on poison, and runs out of memory above 300 padded tokens or on a huge chunk alone."""
    if batch.padded_tokens > 300 or any("HUGE" in chunk.text for chunk in batch.chunks):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if any("POISON" in chunk.text for chunk in batch.chunks):
        raise ValueError("a poisoned row")


class _Recording(FakeEncoder):
    """Counts how often each chunk succeeded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.succeeded: Counter[tuple[object, int]] = Counter()

    def finish(self, handle: Any) -> Any:
        vectors = super().finish(handle)
        self.succeeded.update((chunk.work, chunk.ordinal) for chunk in handle.chunks)
        return vectors


@given(st.lists(some_texts, max_size=40), st.booleans(), st.sampled_from([None, 30_000]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_text_gives_exactly_one_record_and_every_chunk_is_embedded_once(
    texts: list[Any], ordered: bool, budget: int | None
) -> None:
    """Whatever fails on the way: memory, poison, surrogates, blanks, things that are no text."""
    encoder = _Recording(on_batch=temperamental)
    stream = embed_stream(texts, model=encoder, save_path=None, ordered=ordered, max_memory_usage=budget)

    async def read() -> list[Any]:
        return [record async for record in stream]

    try:
        records = asyncio.run(read())
    except ModelError:  # sixteen poisoned chunks in a row, each alone: the model counts as broken
        assert sum("POISON" in str(text) for text in texts) >= 4
        return
    assert sorted(record.index for record in records) == list(range(len(texts)))
    if ordered:
        assert [record.index for record in records] == list(range(len(texts)))
    for record in records:
        source = texts[record.index]
        spoilt = not isinstance(source, str) or not source or any(w in source for w in ("POISON", "HUGE", "\ud800"))
        assert (record.embedding is None) == spoilt == (record.error is not None)
    assert set(encoder.succeeded.values()) <= {1}
    summary = stream.summary
    assert summary.texts == summary.embedded + summary.cached + summary.duplicates + summary.failed == len(texts)
    admission = stream._job.admission.statistics()
    assert (admission.reserved_bytes, admission.n_in_flight) == (0, 0)


@given(st.integers(0, 60), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_reserved_bytes_return_to_zero_wherever_it_is_cancelled(n_steps: int, saved: bool, ordered: bool) -> None:
    """The task is cancelled after so many turns of the loop."""

    async def run(folder: Path | None) -> Any:
        texts = [f"text {i} " * (1 + i % 50) for i in range(300)]
        stream = embed_stream(
            texts, model=FakeEncoder(), save_path=folder, ordered=ordered, max_memory_usage=50_000, overwrite=saved
        )

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.get_running_loop().create_task(read())
        for _ in range(n_steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return stream

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        stream = asyncio.run(run(Path(folder) if saved else None))
    if stream._job is not None:
        admission = stream._job.admission.statistics()
        assert (admission.reserved_bytes, admission.n_in_flight, admission.n_waiting) == (0, 0, 0)
    assert [t.name for t in threading.enumerate() if t.name.startswith("asyncembed")] == []


async def test_text_larger_than_the_whole_budget_is_embedded() -> None:
    texts = ["small", "word " * 5000, "small too"]
    vectors = await embed_stream(texts, model=FakeEncoder(), save_path=None, max_memory_usage=4000)
    assert all(vector is not None for vector in vectors.values())


async def test_one_chunk_that_does_not_fit_alone_fails_its_text_only() -> None:
    texts = [f"good {i}" for i in range(100)] + ["HUGE"]
    stream = embed_stream(texts, model=FakeEncoder(on_batch=temperamental), save_path=None)
    vectors = await stream
    assert [text for text, vector in vectors.items() if vector is None] == ["HUGE"]
    assert "does not fit into memory even alone" in stream.failures[0].error
    assert stream.summary.ooms > 0


async def test_device_that_died_stops_the_run_with_everything_finished_saved(tmp_path: Path) -> None:
    n_batches = 0

    def dies(batch: Batch) -> None:
        nonlocal n_batches
        n_batches += 1
        if n_batches == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    encoder = FakeEncoder(on_batch=dies)
    stream = embed_stream([f"text {i}" for i in range(2000)], model=encoder, save_path=tmp_path, batch_size=50)
    with pytest.raises(ModelError, match="illegal memory access"):
        await stream.run()
    assert len(open_embeddings(tmp_path)) == encoder.rows > 0


class _WatchfulTokenizer(WordTokenizer):
    def __init__(self, threads: set[int]) -> None:
        self._threads = threads

    def tokenize(self, texts: Sequence[str]) -> list[Any]:
        self._threads.add(threading.get_ident())
        return super().tokenize(texts)


class _WatchfulEncoder(FakeEncoder):
    def tokenizer(self) -> WordTokenizer:
        return _WatchfulTokenizer(self.threads)


_DISK_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir", "os.rmdir"}
_seen: list[tuple[int, str, str]] = []
_watching = threading.Event()


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event in _DISK_EVENTS and _watching.is_set():
        _seen.append((threading.get_ident(), event, str(args[0])))


async def test_loop_never_tokenises_and_touches_neither_disk_nor_model(tmp_path: Path) -> None:
    """Python's own audit events say which thread opened, renamed or listed what."""
    texts = [f"text {i} " * (1 + i % 100) for i in range(600)]
    await embed_stream(texts, model=FakeEncoder(), save_path=tmp_path / "warm-up")  # imports happen here
    sys.addaudithook(_audit)
    encoder = _WatchfulEncoder()
    _seen.clear()
    _watching.set()
    try:
        for _ in range(2):  # the second run reads back what the first has saved
            async with embed_stream(texts, model=encoder, save_path=tmp_path / "data") as stream:
                await stream
    finally:
        _watching.clear()
    loop_thread = threading.get_ident()
    assert any(event == "os.rename" for _, event, _ in _seen)
    on_loop = [(event, path) for thread, event, path in _seen if thread == loop_thread]
    assert [found for found in on_loop if not found[1].startswith(("/proc/", "/sys/"))] == []
    assert encoder.threads
    assert loop_thread not in encoder.threads


def test_memory_stays_flat_over_a_long_stream() -> None:
    """80,000 short texts through the whole pipeline; growth over the last 60,000 is under 60 bytes a text.

    `bin/soak --oom` has the same with 300,000.
    """
    grown = subprocess.run(
        [sys.executable, "-m", "tests.children", "grown", "20000", "80000"],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert (grown.returncode, grown.stderr) == (0, "")
    found = json.loads(grown.stdout)
    assert found["n_texts"] == 80_000
    assert found["grown_bytes"] < 60 * 60_000


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("module", ["torch", "sentence_transformers", "transformers", "langchain_text_splitters"])
def test_import_costs_none_of_the_heavy_packages(module: str) -> None:
    code = f"import sys, asyncembed; print({module!r} in sys.modules)"
    assert _python(code).strip() == "False"


def test_public_names_are_all_there() -> None:
    import asyncembed

    for name in asyncembed.__all__:
        assert getattr(asyncembed, name) is not None
    assert set(asyncembed.__all__) <= set(dir(asyncembed))


async def test_duplicates_are_computed_once_and_keep_their_keys(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    source = [Text(f"text {i % 10}", key=f"k{i}") for i in range(1000)]
    async with embed_stream(source, model=encoder, save_path=tmp_path) as stream:
        records = [record async for record in stream]
    assert encoder.rows == 10
    assert stream.summary.duplicates == 990
    assert {record.key for record in records} == {f"k{i}" for i in range(1000)}
    stored = open_embeddings(tmp_path)
    assert stored.by_key("k999").text == "text 9"


async def test_resumed_run_computes_only_what_is_new(tmp_path: Path) -> None:
    first = [f"text {i}" for i in range(50)]
    await embed_stream(first, model=FakeEncoder(), save_path=tmp_path)
    encoder = FakeEncoder()
    async with embed_stream([*reversed(first), "new"], model=encoder, save_path=tmp_path) as stream:
        records = [record async for record in stream]
    assert encoder.rows == 1
    assert (stream.summary.cached, stream.summary.embedded) == (50, 1)
    for record in records:
        assert record.cached == (record.text != "new")
        assert record.embedding is not None


async def test_damaged_file_is_computed_again(tmp_path: Path) -> None:
    await embed_stream(["one", "two"], model=FakeEncoder(), save_path=tmp_path)
    victim = sorted((tmp_path / "embeddings_data").glob("*.json"))[0]
    victim.write_bytes(victim.read_bytes()[:-20])
    encoder = FakeEncoder()
    vectors = await embed_stream(["one", "two"], model=encoder, save_path=tmp_path)
    assert encoder.rows == 1
    assert all(np.isfinite(vector).all() for vector in vectors.values())
    assert json.loads(victim.read_bytes())["id"] == victim.stem
