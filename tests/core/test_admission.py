"""Admission: bytes in flight stay within the budget, everyone gets in, and nothing is left reserved."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.engine.admission import AdmissionQueue, life_bytes
from asyncembed.engine.chunking import Chunker
from asyncembed.engine.work import Client, Work
from asyncembed.records import EmbeddedChunk, EmbeddedText, text_id
from asyncembed.store.json_files import encode_record

from .minilm import chunker

_actions = st.lists(
    st.tuples(st.sampled_from(["reserve", "cancel", "release", "release+cancel", "turn"]), st.integers(0, 200)),
    max_size=60,
)


async def turn() -> None:
    """Let every task that is ready run."""
    for _ in range(3):
        await asyncio.sleep(0)


@settings(deadline=None, max_examples=200)
@given(actions=_actions, budget=st.integers(1, 300))
def test_queue_any_history_keeps_the_budget_and_ends_at_zero(actions: list[tuple[str, int]], budget: int) -> None:
    asyncio.run(_any_history(actions, budget))


async def _any_history(actions: list[tuple[str, int]], budget: int) -> None:
    taken: list[int] = []

    class Watched(AdmissionQueue):
        def _take(self, n_bytes: int) -> None:
            taken.append(n_bytes)
            super()._take(n_bytes)

    queue = Watched(budget)
    asked: list[tuple[int, asyncio.Task[None]]] = []
    admitted: list[tuple[int, int]] = []
    requested = [amount + 1 for action, amount in actions if action == "reserve"]

    async def enter(number: int, n_bytes: int) -> None:
        await queue.reserve(n_bytes)
        admitted.append((number, n_bytes))

    def check() -> None:
        found = queue.statistics()
        assert found.reserved_bytes >= 0
        assert found.reserved_bytes <= budget or found.n_in_flight == 1

    def release(choice: int) -> None:
        if admitted:
            queue.release(admitted.pop(choice % len(admitted))[1])

    for action, amount in actions:
        if action == "reserve":
            asked.append((len(asked), asyncio.ensure_future(enter(len(asked), amount + 1))))
        elif action == "cancel" and asked:
            asked[amount % len(asked)][1].cancel()
        elif action == "release":
            release(amount)
        elif action == "release+cancel" and asked:  # room is given and its receiver cancelled in one turn
            release(amount)
            for _, task in asked:
                if not task.done():
                    task.cancel()
                    break
        else:
            await turn()
        check()
    while True:
        await turn()
        check()
        if all(task.done() for _, task in asked):
            break
        assert admitted, "somebody waits though nothing is in flight"
        release(0)
    if asked:
        await asyncio.wait([task for _, task in asked])
    remaining = iter(requested)  # first come, first served: what was let in is a subsequence of what was asked for
    assert all(n_bytes in remaining for n_bytes in taken)
    while admitted:
        release(0)
    assert queue.statistics() == (0, budget, 0, 0)


async def test_reserve_over_budget_text_is_let_in_alone() -> None:
    queue = AdmissionQueue(100)
    assert queue.reserve_nowait(10)
    big = asyncio.ensure_future(queue.reserve(1000))
    await turn()
    assert not big.done()
    queue.release(10)
    await asyncio.wait_for(big, 10)
    assert not queue.reserve_nowait(1)
    queue.release(1000)
    assert queue.statistics() == (0, 100, 0, 0)


async def test_reserve_small_one_does_not_pass_a_large_one_that_waits() -> None:
    queue = AdmissionQueue(100)
    await queue.reserve(50)
    large = asyncio.ensure_future(queue.reserve(80))
    await turn()
    assert not queue.reserve_nowait(1)
    small = asyncio.ensure_future(queue.reserve(1))
    await turn()
    assert not small.done()
    queue.release(50)
    await asyncio.wait_for(asyncio.gather(large, small), 10)


async def test_reserve_cancelled_at_the_head_lets_the_next_one_in() -> None:
    queue = AdmissionQueue(100)
    await queue.reserve(50)
    large, small = asyncio.ensure_future(queue.reserve(80)), asyncio.ensure_future(queue.reserve(20))
    await turn()
    large.cancel()
    await asyncio.wait_for(small, 10)
    assert queue.statistics() == (70, 100, 2, 0)


async def test_reserve_cancelled_in_the_turn_it_was_granted_hands_the_room_on() -> None:
    queue = AdmissionQueue(100)
    await queue.reserve(100)
    first, second = asyncio.ensure_future(queue.reserve(90)), asyncio.ensure_future(queue.reserve(60))
    await turn()
    queue.release(100)  # granted to the first, which has not run yet
    assert queue.statistics() == (90, 100, 1, 1)
    first.cancel()
    await asyncio.wait_for(second, 10)
    assert first.cancelled()
    assert queue.statistics() == (60, 100, 1, 0)


async def test_reserve_under_pressure_leaves_an_eighth_open_so_that_batches_stay_batches() -> None:
    queue = AdmissionQueue(8000, lambda: True)
    admitted = 0
    while queue.reserve_nowait(100):
        admitted += 1
    assert admitted == 10


def test_life_bytes_counts_what_overlapping_chunks_repeat() -> None:
    """1,991 chunks of 100 tokens that share 90: their vectors as float32 and as JSON alone."""
    text = "boat " * 20_000
    n_chunks = (20_000 - 90) // 10
    assert life_bytes(text, 384, 100, 90) >= n_chunks * 384 * (4 + 20)
    assert life_bytes(text, 384, 100, 90) > 5 * life_bytes(text, 384, 100)


async def test_reserve_under_pressure_waits_while_anything_is_in_flight_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pressed = True
    queue = AdmissionQueue(6400, lambda: pressed)
    with caplog.at_level(logging.WARNING, "asyncembed"):
        assert queue.reserve_nowait(200)  # nothing was in flight
        waiting = [asyncio.ensure_future(queue.reserve(700)) for _ in range(3)]
        await turn()
        assert queue.statistics().n_waiting == 3
        queue.release(200)  # one of them at a time while the pressure lasts
        await turn()
        assert [task.done() for task in waiting] == [True, False, False]
        pressed = False
        queue.release(700)
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        pressed = True
        for _ in range(3):
            queue.reserve_nowait(200)
    assert len(caplog.records) == 1
    assert "max_memory_usage (6400 bytes)" in caplog.text


async def test_reserve_pressure_is_not_measured_for_every_text() -> None:
    measured = 0

    def measure() -> bool:
        nonlocal measured
        measured += 1
        return False

    queue = AdmissionQueue(64_000, measure)
    for _ in range(1000):
        assert queue.reserve_nowait(10)
    assert 5 <= measured <= 11  # 10,000 bytes in steps of a 64th of the budget


async def test_release_more_than_reserved_is_a_bug() -> None:
    queue = AdmissionQueue(100)
    await queue.reserve(10)
    with pytest.raises(AssertionError, match="this is a bug"):
        queue.release(11)
    with pytest.raises(AssertionError, match="this is a bug"):
        AdmissionQueue(100).release(0)


# --- the estimate ---

_SCRIPTS: dict[str, str] = {
    "english": "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised. ",
    "german": "Über den Wölkchen müßte die Größe der Straße wohl grenzenlos übermäßig schön sein. ",
    "russian": "Сегодня очень хорошая погода, и мы идём гулять в старый парк за рекой. ",
    "arabic": "ذهب الولد إلى المدرسة في الصباح الباكر ثم عاد إلى البيت مساء. ",
    "hindi": "आज मौसम बहुत अच्छा है और हम सब बाज़ार जा रहे हैं। ",
    "chinese": "今天天气很好，我们去公园散步，然后回家吃饭。",
    "japanese": "今日はとても天気がいいので、公園まで散歩に行きました。",
    "korean": "오늘은 날씨가 아주 좋아서 우리는 공원으로 산책을 갑니다. ",
    "emoji": "Great news 😀🎉 we made it to the top 🏔️ today! ",
    "code": "def f(x): return {k: v[0] for k, v in x.items() if k != '_'}\n",
    "numbers": "3.14159 2718 0x1f2e 99,100;\t-17.5e-3 ",
}


def bytes_of(text: str, made_by: Chunker, dim: int) -> int:
    """What the parts of a text's record take: strings, ids, vectors and encoded JSON."""
    result = Work(Client(), text)
    made_by.chunk([result])
    assert result.error is None
    numbers = np.random.default_rng(3)
    chunks = tuple(
        EmbeddedChunk(piece.text, piece.start, piece.n_tokens, numbers.normal(0, 0.05, dim).astype(np.float32))
        for piece in result.chunks
    )
    alone = len(chunks) == 1
    vector = chunks[0].embedding if alone else numbers.normal(0, 0.05, dim).astype(np.float32)
    record = EmbeddedText(text_id(text), 0, None, text, vector, chunks, result.n_tokens)
    arrays = [piece.ids for piece in result.chunks] + [vector] * (not alone) + [chunk.embedding for chunk in chunks]
    strings = [text] if alone else [text, *(chunk.text for chunk in chunks)]
    return (
        len(encode_record(record))
        + sum(array.nbytes for array in arrays)
        + sum(sys.getsizeof(part) for part in strings)
    )


@pytest.mark.parametrize("n_chars", [20, 300, 2_000, 60_000])
@pytest.mark.parametrize("script", _SCRIPTS)
def test_life_bytes_real_text_is_an_upper_estimate(script: str, n_chars: int) -> None:
    sample = _SCRIPTS[script]
    text = (sample * (n_chars // len(sample) + 1))[:n_chars]
    made_by, dim = chunker(), 384
    actual = bytes_of(text, made_by, dim)
    assert actual <= life_bytes(text, dim, made_by.chunk_size) <= 6 * actual


@given(text=st.text(st.characters(codec=None, exclude_categories=()), max_size=200))
def test_life_bytes_any_text_has_one(text: str) -> None:
    assert life_bytes(text, 384, 254) > len(text)


@pytest.mark.parametrize("dim", [8, 4096])
def test_life_bytes_counts_the_vector(dim: int) -> None:
    grown: Callable[[int], int] = lambda dims: life_bytes("short", dims, 254)  # noqa: E731  # two calls, one line
    assert grown(2 * dim) - grown(dim) >= dim * (4 + 20)
