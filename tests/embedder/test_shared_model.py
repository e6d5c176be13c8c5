"""A job and an app's requests on one model: what goes first, whose end is whose, and what is kept on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncembed import AsyncEmbedder, ClosedError, ModelError, OptionsError, embed_stream, open_embeddings
from asyncembed.records import Batch
from tests.fakes import FakeEncoder

from .doubles import at_rest, held_model, until, vector

pytestmark = pytest.mark.usefixtures("no_leftovers")


def start(work: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)


def bulk(count: int) -> list[str]:
    return [f"bulk {number}" for number in range(count)]


async def run(texts: Any, embedder: AsyncEmbedder, **options: Any) -> Any:
    return await embed_stream(texts, embedder=embedder, **{"save_path": None, **options})


async def test_job_gives_what_it_gives_alone_and_leaves_the_embedder_open(tmp_path: Path) -> None:
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        found = await run(bulk(40), embedder, save_path=tmp_path / "data")
        assert {text: row.tolist() for text, row in found.items()} == {text: vector(text) for text in bulk(40)}
        assert (await embedder.embed("heron")).tolist() == vector("heron")
        assert at_rest(embedder)
    again = embed_stream(bulk(41), model=FakeEncoder(), save_path=tmp_path / "data")  # the same folder, on its own
    assert (await again.run()).cached == 40
    assert len(open_embeddings(tmp_path / "data")) == 41


async def test_job_has_its_own_prompt_chunks_and_length() -> None:
    async with AsyncEmbedder(FakeEncoder(max_tokens=10), normalize_embeddings=True) as embedder:
        own: dict[str, Any] = {"prompt": "p: ", "chunk_size": 2, "normalize_embeddings": False}
        stream = embed_stream(["aa bb ccc"], embedder=embedder, save_path=None, **own)
        async for record in stream:
            assert [chunk.text.strip() for chunk in record.chunks] == ["aa bb", "ccc"]
            assert record.chunks[0].embedding.tolist() == vector("p: aa bb")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"device": "cuda"}, "device='cuda' is not the embedder's"), ({"model": "other"}, "model='other' is not")],
)
async def test_job_option_about_the_model_that_differs_is_refused(options: dict[str, Any], reason: str) -> None:
    embedder = AsyncEmbedder(FakeEncoder(), device="cpu")
    with pytest.raises(OptionsError, match=reason):
        embed_stream(["heron"], embedder=embedder, save_path=None, **options)
    embed_stream(["heron"], embedder=embedder, save_path=None, device="cpu", model=embedder.options.model)


async def test_job_on_an_embedder_that_is_not_open_is_refused() -> None:
    embedder = AsyncEmbedder(FakeEncoder())
    with pytest.raises(ClosedError, match="not open"):
        await run(bulk(3), embedder)
    async with embedder:
        pass
    with pytest.raises(ClosedError, match="closed"):
        await run(bulk(3), embedder)


@pytest.mark.parametrize("slots", [1, 2])
async def test_request_beside_a_saturating_job_is_in_the_next_batch_that_begins(slots: int) -> None:
    gate, encoder = held_model(slots=slots)
    async with AsyncEmbedder(encoder, batch_size=5) as embedder:
        job = start(run(bulk(200), embedder))
        await gate.begun()
        for _ in range(slots - 1):
            gate.let_go()
            await gate.begun()
        await until(lambda: embedder.statistics().waiting_chunks >= 100)
        for number in range(3):
            asked = start(embedder.embed(f"asked {number}"))
            await until(lambda: _waits(embedder))
            gate.let_go()
            assert f"asked {number}" in await gate.begun()
            while not asked.done():
                gate.let_go()
                await gate.begun()
        gate.let_go(100)
        assert len(await job) == 200


def _waits(embedder: AsyncEmbedder) -> bool:
    """Whether an interactive row waits for the model."""
    requests: Any = embedder._requests
    return requests.engine.scheduler.heap.most_urgent() == 0


async def test_job_starts_while_the_model_is_held_by_a_batch(tmp_path: Path) -> None:
    """What it needs before its first text needs no model: requests would wait for it otherwise."""
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder, batch_size=1) as embedder:
        asked = start(embedder.embed("somebody waits"))
        await gate.begun()
        job = start(run(bulk(5), embedder, save_path=tmp_path))
        await until(lambda: embedder.statistics().waiting_chunks == 5)
        assert not asked.done()
        gate.let_go(10)
        assert len(await job) == 5
        assert (await asked).tolist() == vector("somebody waits")


async def test_job_that_cannot_save_fast_enough_does_not_hold_requests_back(tmp_path: Path) -> None:
    """Its results pile up unread by its store: only its own rows wait."""
    blocked, release = asyncio.Event(), asyncio.Event()
    async with AsyncEmbedder(FakeEncoder()) as embedder:
        stream = embed_stream(bulk(3000), embedder=embedder, save_path=tmp_path / "data")
        job = start(stream.run())
        await until(lambda: stream._job is not None and stream._job._store is not None)
        assert stream._job is not None
        store: Any = stream._job._store
        commit = store.commit

        async def slow(records: Any) -> None:
            blocked.set()
            await release.wait()
            await commit(records)

        store.commit = slow
        with anyio.fail_after(60):
            await blocked.wait()
            # What is computed and unsaved stays bounded, and a request passes by.
            assert (await embedder.embed("heron")).tolist() == vector("heron")
            client: Any = stream._job._client
            assert client._n_taken + client._n_computed <= 256 + 2 * 1024
            release.set()
            assert (await job).embedded == 3000


async def test_job_left_early_drops_its_own_texts_only() -> None:
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder, batch_size=2) as embedder:
        first, second = start(run(bulk(20), embedder)), start(run([f"other {n}" for n in range(6)], embedder))
        await gate.begun()
        await until(lambda: embedder.statistics().waiting_chunks == 24)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.let_go(100)
        assert len(await second) == 6
        assert at_rest(embedder)
    assert sum(text.startswith("bulk") for texts in gate.batches for text in texts) <= 4


async def test_job_stopped_ends_with_its_batch_in_hand_while_the_embedder_goes_on() -> None:
    gate, encoder = held_model()
    async with AsyncEmbedder(encoder, batch_size=2) as embedder:
        stream = embed_stream(bulk(20), embedder=embedder, save_path=None)
        job = start(stream.run())
        await gate.begun()
        await until(lambda: embedder.statistics().waiting_chunks == 18)
        stream.stop()
        gate.let_go(1)
        summary = await job
        assert summary.stopped
        assert summary.embedded == 2
        gate.let_go(100)
        assert (await embedder.embed("heron")).tolist() == vector("heron")


async def test_jobs_and_requests_at_once_each_get_their_own() -> None:
    async with AsyncEmbedder(FakeEncoder(slots=2)) as embedder:
        jobs = [start(run([f"job {number} text {n}" for n in range(200)], embedder)) for number in range(3)]
        asked = [start(embedder.embed(f"asked {number}")) for number in range(50)]
        for number, found in enumerate(await asyncio.gather(*jobs)):
            wanted = [f"job {number} text {n}" for n in range(200)]
            assert {text: row.tolist() for text, row in found.items()} == {text: vector(text) for text in wanted}
        assert [row.tolist() for row in await asyncio.gather(*asked)] == [vector(f"asked {n}") for n in range(50)]
        assert at_rest(embedder)


async def test_embedder_closed_while_a_job_runs_ends_it_clearly_and_keeps_what_was_done(tmp_path: Path) -> None:
    gate, encoder = held_model()
    embedder = await AsyncEmbedder(encoder, batch_size=10).__aenter__()
    job = start(embed_stream(bulk(100), embedder=embedder, save_path=tmp_path / "data").run())
    gate.let_go(3)
    for _ in range(4):
        await gate.begun()
    closing = start(embedder.aclose())
    await until(lambda: embedder.statistics().state == "closing")
    gate.let_go(100)
    with pytest.raises(ClosedError, match="the embedder was closed before this was done"):
        await job
    await closing
    assert len(gate.batches) <= 5
    assert len(open_embeddings(tmp_path / "data")) >= 20


async def test_embedder_closed_while_a_jobs_source_blocks_ends_it() -> None:
    waits = asyncio.Event()

    async def endless() -> AsyncIterator[str]:
        yield "one"
        waits.set()
        await asyncio.Event().wait()

    async with AsyncEmbedder(FakeEncoder()) as embedder:
        job = start(run(endless(), embedder))
        await waits.wait()
    with anyio.fail_after(60), pytest.raises(ClosedError):
        await job


async def test_dead_device_ends_jobs_and_requests_alike() -> None:
    gate, encoder = held_model()
    die = asyncio.Event()

    def on_batch(batch: Batch) -> None:
        if die.is_set():
            raise RuntimeError("CUDA error: device-side assert triggered")
        gate(batch)

    encoder._on_batch = on_batch
    async with AsyncEmbedder(encoder, batch_size=5) as embedder:
        job = start(run(bulk(50), embedder))
        await gate.begun()
        asked = start(embedder.embed("heron"))
        die.set()
        gate.let_go(100)
        for task in (job, asked):
            with pytest.raises(ModelError, match="device-side assert"):
                await task


async def test_request_goes_between_the_parts_of_a_jobs_failed_batch() -> None:
    gate, encoder = held_model()

    def on_batch(batch: Batch) -> None:
        gate(batch)
        if any(chunk.text == "bulk 3" for chunk in batch.chunks):
            raise ValueError("bad row")

    encoder._on_batch = on_batch
    async with AsyncEmbedder(encoder, batch_size=8) as embedder:
        stream = embed_stream(bulk(8), embedder=embedder, save_path=None)
        job = start(stream.run())
        await gate.begun()
        asked = start(embedder.embed("somebody waits"))
        await until(lambda: embedder.statistics().pending_bytes > 0)
        await until(lambda: _waits(embedder))
        gate.let_go(1)
        assert await gate.begun() == ["somebody waits"]
        gate.let_go(100)
        await asked
        summary = await job
    assert (summary.embedded, summary.failed) == (7, 1)
