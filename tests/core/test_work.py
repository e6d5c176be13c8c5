"""Chunk vectors into one vector a text, against the definition computed another way."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asyncembed.engine import work as work_module
from asyncembed.engine.work import Client, Work, add_vectors, defect, normalized, weighted_average
from asyncembed.records import Chunk, FloatVector

from .fakes import work, works

DIM = 4
_numbers = st.floats(-1000, 1000, width=32)
_sound = hnp.arrays(np.float32, DIM, elements=_numbers).filter(lambda vector: bool(vector.any()))


def text_of(weights: list[int], client: Client | None = None, owner: int = 0) -> Work:
    return work(*[weight + 2 for weight in weights], owner=owner, client=client or Client(), weights=weights)


def assemble(weights: list[int], vectors: list[np.ndarray], client: Client | None = None) -> Work:
    """One text whose vectors come all at once."""
    made = text_of(weights, client)
    assert add_vectors(made.chunks, np.stack(vectors)) == [made]
    assert not made.is_open
    return made


def exact_average(vectors: list[np.ndarray], weights: list[int]) -> list[float]:
    """Σ weight × vector / Σ weight in exact arithmetic."""
    total = sum(weights)
    return [
        float(
            sum(Fraction(float(vector[at])) * weight for vector, weight in zip(vectors, weights, strict=True)) / total
        )
        for at in range(DIM)
    ]


@given(rows=st.lists(st.tuples(_sound, st.integers(1, 512)), min_size=2, max_size=8))
def test_add_many_chunks_is_their_average_weighted_by_tokens(rows: list[tuple[np.ndarray, int]]) -> None:
    vectors, weights = [vector for vector, _ in rows], [weight for _, weight in rows]
    expected = exact_average(vectors, weights)
    done = assemble(weights, vectors)
    if done.embedding is None:
        assert done.error is not None
        assert not np.any(np.abs(expected) > 1e-9)  # they cancel out
        return
    assert done.embedding.dtype == np.float32
    np.testing.assert_allclose(done.embedding, expected, rtol=1e-6, atol=1e-9)
    assert [piece.n_tokens for piece in done.pieces()] == weights


@given(vector=_sound)
def test_add_one_chunk_passes_its_vector_bit_for_bit(vector: np.ndarray) -> None:
    done = assemble([5], [vector])
    assert done.embedding is not None
    assert done.embedding.tobytes() == vector.tobytes()
    assert done.pieces()[0].embedding is done.embedding


def test_weighted_average_sums_in_double_precision() -> None:
    vectors = np.array([[2.0**24]] + [[1.0]] * 1000, np.float32)
    average = weighted_average(vectors, [1] * 1001)
    assert average[0] == np.float32((2.0**24 + 1000) / 1001)


@settings(deadline=None)
@given(data=st.data(), n_texts=st.integers(1, 6))
def test_add_any_order_of_arrival_and_any_clients_give_the_same(data: st.DataObject, n_texts: int) -> None:
    weights = [data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)) for _ in range(n_texts)]
    clients = [Client(), Client(normalize=True), Client(truncate_dim=2)]
    chosen = [data.draw(st.sampled_from(clients)) for _ in range(n_texts)]

    def run(seed: int | None, batch: int) -> list[FloatVector | None]:
        texts = [text_of(own, client) for own, client in zip(weights, chosen, strict=True)]
        rows = [(at, chunk) for at, text in enumerate(texts) for chunk in text.chunks]
        order: list[tuple[int, Chunk]] = rows if seed is None else data.draw(st.permutations(rows))
        done: list[Work] = []
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            vectors = [[at + 1, chunk.ordinal, chunk.n_tokens, 1] for at, chunk in part]
            done += add_vectors([chunk for _, chunk in part], np.array(vectors, np.float32))
        assert sorted(map(id, done)) == sorted(map(id, texts))
        return [text.embedding for text in texts]

    for one, other in zip(run(None, 100), run(1, data.draw(st.integers(1, 5))), strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([1, math.nan, 0, 0], "NaN"),
        ([1, math.inf, 0, 0], "infinity"),
        ([0, -math.inf, 0, 0], "inf"),
        ([0] * 4, "zeros"),
    ],
)
def test_add_unusable_row_fails_its_text_and_no_other(bad: list[float], reason: str, normalize: bool) -> None:
    texts = works([5] * 3, client=Client(normalize=normalize))
    vectors = np.array([[1, 0, 0, 0], bad, [0, 1, 0, 0]], np.float32)
    done = add_vectors([text.chunks[0] for text in texts], vectors)
    assert sorted(map(id, done)) == sorted(map(id, texts))
    assert texts[1].embedding is None
    assert reason in str(texts[1].error)
    assert [texts[at].embedding.tolist() for at in (0, 2)] == [[1, 0, 0, 0], [0, 1, 0, 0]]  # type: ignore[union-attr]


def test_add_unusable_chunk_fails_the_whole_text_once_and_late_chunks_are_ignored() -> None:
    text = text_of([3, 3, 3])
    first, second, third = text.chunks
    assert add_vectors([first], np.ones((1, DIM), np.float32)) == []
    assert add_vectors([second], np.full((1, DIM), np.nan, np.float32)) == [text]
    assert text.embedding is None
    assert add_vectors([third], np.ones((1, DIM), np.float32)) == []
    assert add_vectors([third], np.full((1, DIM), np.nan, np.float32)) == []
    assert text.pieces() == ()


def test_add_zero_beyond_the_kept_dimensions_is_what_counts() -> None:
    done = assemble([3], [np.array([0, 0, 1, 1], np.float32)], Client(truncate_dim=2))
    assert done.embedding is None
    assert "zeros" in str(done.error)


def test_add_chunks_that_cancel_out_are_a_failed_text() -> None:
    done = assemble([4, 4], [np.full(DIM, 1, np.float32), np.full(DIM, -1, np.float32)])
    assert done.embedding is None
    assert "average of its 2 chunks" in str(done.error)


@given(rows=st.lists(st.tuples(_sound, st.integers(1, 99)), min_size=1, max_size=5), keep=st.none() | st.integers(1, 4))
def test_add_normalize_truncates_first_and_scales_chunks_and_text(
    rows: list[tuple[np.ndarray, int]], keep: int | None
) -> None:
    client = Client(normalize=True, truncate_dim=keep)
    done = assemble([weight for _, weight in rows], [vector for vector, _ in rows], client)
    if done.embedding is None:
        return
    assert done.embedding.shape == (keep or DIM,)
    lengths = [
        math.hypot(*map(float, vector)) for vector in (done.embedding, *(part.embedding for part in done.pieces()))
    ]
    shortest = min(math.hypot(*map(float, vector[:keep])) for vector, _ in rows)
    if shortest > 1e-6:
        assert lengths == pytest.approx([1.0] * len(lengths), abs=1e-5)


@pytest.mark.parametrize("size", [1e30, 1e-8])
def test_normalized_very_large_and_small_rows_have_length_one(size: float) -> None:
    scaled = normalized(np.full((1, DIM), size, np.float32))
    assert scaled.dtype == np.float32
    assert np.linalg.norm(scaled) == pytest.approx(1.0)


def test_normalized_zero_row_stays_zero() -> None:
    assert not normalized(np.zeros((2, DIM), np.float32)).any()


@pytest.mark.parametrize("client", [Client(), Client(normalize=True), Client(truncate_dim=2)])
def test_add_kept_vector_does_not_keep_the_batch_alive(client: Client) -> None:
    done = assemble([5], [np.ones(DIM, np.float32)], client)
    assert done.embedding is not None
    assert done.embedding.base is None


def test_add_rows_missing_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="this is a bug"):
        add_vectors(text_of([1, 1]).chunks, np.ones((1, DIM), np.float32))


def test_add_same_chunk_twice_is_a_bug() -> None:
    text = text_of([1, 1])
    with pytest.raises(AssertionError, match="this is a bug"):
        add_vectors([text.chunks[0], text.chunks[0]], np.ones((2, DIM), np.float32))


def test_defect_sound_vector_has_none() -> None:
    assert defect(np.array([0, 1e-30], np.float32)) is None


def test_add_memory_that_runs_out_for_the_batch_is_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = work_module._usable_rows

    def narrow(vectors: np.ndarray, *, normalize: bool) -> list[FloatVector | None]:
        if len(vectors) > 2 or (vectors[:, 0] == 5).any():
            raise MemoryError
        return whole(vectors, normalize=normalize)

    monkeypatch.setattr(work_module, "_usable_rows", narrow)
    texts = works([5] * 8, client=Client())[1:]
    vectors = np.array([[owner, 1, 1, 1] for owner in range(1, 8)], np.float32)
    done = add_vectors([text.chunks[0] for text in texts], vectors)
    assert sorted(str(text.text) for text in done) == list("1234567")
    assert {text.text: text.error for text in done if text.error} == {"5": "its vector does not fit into memory"}
    assert all(str(int(text.embedding[0])) == text.text for text in done if text.embedding is not None)


def test_add_memory_that_runs_out_for_the_average_fails_its_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    client = Client()
    two, one = text_of([3, 4], client, 1), text_of([5], client, 2)
    monkeypatch.setattr(work_module, "weighted_average", exhausted)
    done = add_vectors([*two.chunks, *one.chunks], np.ones((3, DIM), np.float32))
    errors = {text.text: text.error for text in done}
    assert errors == {"1": "the average of its 2 chunks does not fit into memory", "2": None}


def test_weighted_average_of_more_than_are_averaged_at_once_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    vectors, weights = rng.standard_normal((1300, DIM)).astype(np.float32), rng.integers(1, 256, 1300)
    expected = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(weighted_average(list(vectors), weights.tolist()), expected, rtol=1e-6)


def test_add_large_text_leaves_its_average_to_be_computed_elsewhere() -> None:
    done = assemble([3] * 600, [np.ones(DIM, np.float32)] * 600)
    assert done.is_pending
    done.average()
    assert not done.is_pending
    assert done.embedding is not None
    assert done.embedding.tolist() == [1.0] * DIM
