"""Any mixture of requests, cancellations, failures and closing: everyone is answered, and nothing is left."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed import AsyncEmbedder, AsyncEmbedError, embed_stream
from asyncembed.embedder.requests import ENTRY_OVERHEAD, AnswerCache
from asyncembed.encoders import Instruction
from asyncembed.records import Batch
from tests.fakes import FakeEncoder

from .doubles import at_rest, vector

_words = st.sampled_from(["heron", "boat", "reeds", "poison", "river"])
_texts = st.lists(st.lists(_words, max_size=9).map(" ".join), max_size=6)
_calls = st.lists(
    st.tuples(
        st.sampled_from(["embed", "records", "nowait", "thread", "job"]),
        _texts,
        st.sampled_from(["interactive", "bulk", 5]),
        st.sampled_from([None, 0.0, 60.0]),
        st.integers(0, 12),  # turns of the loop before it is cancelled; 12 never
    ),
    max_size=14,
)
_ends = st.sampled_from(["drain", "abort", "die", "cancel"])


@settings(deadline=None, max_examples=120)
@given(
    calls=_calls,
    end=_ends,
    turns=st.integers(0, 30),
    slots=st.integers(1, 2),
    capacity=st.integers(4, 60),
    room=st.sampled_from([3000, 20_000]),
)
def test_any_mixture_everyone_is_answered_and_nothing_is_left(
    calls: list[Any], end: str, turns: int, slots: int, capacity: int, room: int
) -> None:
    dying = False

    def on_batch(batch: Batch) -> None:
        if dying:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if batch.padded_tokens > capacity:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if any("poison" in chunk.text for chunk in batch.chunks):
            raise ValueError("bad row")

    async def go() -> None:
        nonlocal dying
        encoder = FakeEncoder(max_tokens=8, on_batch=on_batch, slots=slots)
        embedder = await AsyncEmbedder(encoder, max_pending_bytes=room, cache_bytes=2000).__aenter__()
        tasks = [asyncio.ensure_future(ask(embedder, *call[:4])) for call in calls]
        for turn in range(turns):
            for task, call in zip(tasks, calls, strict=True):
                if call[4] == turn < 12:
                    task.cancel()
            await anyio.lowlevel.checkpoint()
        dying = end == "die"
        closing = asyncio.ensure_future(embedder.aclose(drain=end in ("drain", "cancel")))
        if end == "cancel":
            await anyio.lowlevel.checkpoint()
            closing.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(closing, return_exceptions=True)
        await embedder.aclose()
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, BaseException):
                assert isinstance(answer, AsyncEmbedError | asyncio.CancelledError), repr(answer)
            elif call[0] != "job":
                check(call[1], answer)
        assert at_rest(embedder)
        assert len(embedder._requests._works) == 0  # type: ignore[union-attr]  # it was open
        assert not embedder._requests.engine.scheduler  # type: ignore[union-attr]

    async def bounded() -> None:
        with anyio.fail_after(60):
            await go()

    asyncio.run(bounded())


def check(texts: list[str], answer: Any) -> None:
    """Rows of texts that are one chunk; a longer one is an average."""
    assert len(answer) == len(texts)
    for text, row in zip(texts, answer, strict=True):
        if row is not None and len(text.split()) <= 6:
            assert row.tolist() == vector(text)


async def ask(embedder: AsyncEmbedder, way: str, texts: list[str], priority: Any, deadline_s: float | None) -> Any:
    if way == "embed":
        return await embedder.embed(texts, priority=priority, deadline_s=deadline_s)
    if way == "records":
        return [record.embedding for record in await embedder.embed_records(texts, priority=priority)]
    if way == "nowait":
        return await embedder.embed_nowait(texts, priority=priority)
    if way == "thread":
        return await asyncio.wrap_future(embedder.embed_threadsafe(texts, priority=priority))
    return await embed_stream([f"{text} of a job" for text in texts], embedder=embedder, save_path=None)


@given(
    max_bytes=st.integers(0, 4000),
    steps=st.lists(st.tuples(st.booleans(), st.text("abé", max_size=2), st.integers(1, 30)), max_size=60),
)
def test_cache_any_use_stays_within_its_bytes_and_drops_the_least_recent(
    max_bytes: int, steps: list[tuple[bool, str, int]]
) -> None:
    cache, order = AnswerCache(max_bytes), dict[str, Any]()
    for puts, text, dim in steps:
        if puts:
            row = np.zeros(dim, np.float32)
            cache.put((Instruction(), text), row, dim)
            if ENTRY_OVERHEAD + len(text) * (1 if text.isascii() else 4) + 4 * dim <= max_bytes:
                order.setdefault(text, row)
        else:
            found = cache.get((Instruction(), text))
            if found is not None:
                assert order[text] is found[0]
                order[text] = order.pop(text)
        assert cache.n_bytes <= max_bytes
        kept = list(order)[len(order) - len(cache) :]
        assert all((Instruction(), text) in cache._answers for text in kept)
        order = {text: order[text] for text in kept}
