"""Chunk vectors into one vector a text, against the definition computed another way."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asyncembed.assembly import Assembled, Assembler, defect, normalized, weighted_average
from asyncembed.records import Chunk

from .fakes import chunk

DIM = 4
_numbers = st.floats(-1000, 1000, width=32)
_sound = hnp.arrays(np.float32, DIM, elements=_numbers).filter(lambda vector: bool(vector.any()))


def pieces(owner: int, weights: list[int]) -> list[Chunk]:
    return [chunk(weight + 2, owner=owner, ordinal=number, n_tokens=weight) for number, weight in enumerate(weights)]


def assemble(assembler: Assembler, weights: list[int], vectors: list[np.ndarray]) -> Assembled:
    """One text through an assembler."""
    assembler.expect(7, len(weights))
    done = assembler.add(pieces(7, weights), np.stack(vectors))
    assert len(done) == 1
    assert len(assembler) == 0
    return done[0]


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
    done = assemble(Assembler(), weights, vectors)
    if done.embedding is None:
        assert done.error is not None
        assert not np.any(np.abs(expected) > 1e-9)  # they cancel out
        return
    assert done.embedding.dtype == np.float32
    np.testing.assert_allclose(done.embedding, expected, rtol=1e-6, atol=1e-9)
    assert done.n_tokens == sum(weights)
    assert [piece.n_tokens for piece in done.chunks] == weights


@given(vector=_sound)
def test_add_one_chunk_passes_its_vector_bit_for_bit(vector: np.ndarray) -> None:
    done = assemble(Assembler(), [5], [vector])
    assert done.embedding is not None
    assert done.embedding.tobytes() == vector.tobytes()
    assert done.chunks[0].embedding is done.embedding


def test_weighted_average_sums_in_double_precision() -> None:
    vectors = np.array([[2.0**24]] + [[1.0]] * 1000, np.float32)
    average = weighted_average(vectors, [1] * 1001)
    assert average[0] == np.float32((2.0**24 + 1000) / 1001)


@settings(deadline=None)
@given(data=st.data(), n_texts=st.integers(1, 6))
def test_add_any_order_of_arrival_gives_the_same(data: st.DataObject, n_texts: int) -> None:
    weights = {owner: data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)) for owner in range(n_texts)}
    rows = [piece for owner, own in weights.items() for piece in pieces(owner, own)]
    vectors = {
        (row.owner, row.ordinal): np.array([row.owner + 1, row.ordinal, row.n_tokens, 1], np.float32) for row in rows
    }

    def run(order: list[Chunk], batch: int) -> dict[int, Assembled]:
        assembler = Assembler()
        for owner, own in weights.items():
            assembler.expect(owner, len(own))
        done: list[Assembled] = []
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            done += assembler.add(part, np.stack([vectors[row.owner, row.ordinal] for row in part]))
        assert len(assembler) == 0
        assert sorted(text.owner for text in done) == sorted(weights)
        return {text.owner: text for text in done}

    straight = run(rows, len(rows))
    shuffled = run(data.draw(st.permutations(rows)), data.draw(st.integers(1, 5)))
    for owner, text in straight.items():
        other = shuffled[owner]
        assert text.embedding is not None
        assert other.embedding is not None
        assert text.embedding.tobytes() == other.embedding.tobytes()
        assert [piece.n_tokens for piece in other.chunks] == weights[owner]


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
    assembler = Assembler(normalize=normalize)
    for owner in range(3):
        assembler.expect(owner, 1)
    rows = [chunk(5, owner=owner) for owner in range(3)]
    vectors = np.array([[1, 0, 0, 0], bad, [0, 1, 0, 0]], np.float32)
    done = {text.owner: text for text in assembler.add(rows, vectors)}
    assert done[1].embedding is None
    assert reason in str(done[1].error)
    assert done[0].embedding is not None
    assert done[2].embedding is not None
    assert done[0].embedding.tolist() == [1, 0, 0, 0]
    assert done[2].embedding.tolist() == [0, 1, 0, 0]


def test_add_unusable_chunk_fails_the_whole_text_once_and_late_chunks_are_ignored() -> None:
    assembler = Assembler()
    assembler.expect(1, 3)
    first, second, third = pieces(1, [3, 3, 3])
    assert assembler.add([first], np.ones((1, DIM), np.float32)) == []
    failed = assembler.add([second], np.full((1, DIM), np.nan, np.float32))
    assert [(text.owner, text.embedding) for text in failed] == [(1, None)]
    assert assembler.add([third], np.ones((1, DIM), np.float32)) == []
    assert assembler.add([third], np.full((1, DIM), np.nan, np.float32)) == []
    assert assembler.fail(1, "again") is None


def test_add_zero_beyond_the_kept_dimensions_is_what_counts() -> None:
    done = assemble(Assembler(truncate_dim=2), [3], [np.array([0, 0, 1, 1], np.float32)])
    assert done.embedding is None
    assert "zeros" in str(done.error)


def test_add_chunks_that_cancel_out_are_a_failed_text() -> None:
    done = assemble(Assembler(), [4, 4], [np.full(DIM, 1, np.float32), np.full(DIM, -1, np.float32)])
    assert done.embedding is None
    assert "average of its 2 chunks" in str(done.error)


@given(rows=st.lists(st.tuples(_sound, st.integers(1, 99)), min_size=1, max_size=5), keep=st.none() | st.integers(1, 4))
def test_add_normalize_truncates_first_and_scales_chunks_and_text(
    rows: list[tuple[np.ndarray, int]], keep: int | None
) -> None:
    done = assemble(
        Assembler(normalize=True, truncate_dim=keep), [weight for _, weight in rows], [vector for vector, _ in rows]
    )
    if done.embedding is None:
        return
    assert done.embedding.shape == (keep or DIM,)
    lengths = [
        math.hypot(*map(float, vector)) for vector in (done.embedding, *(part.embedding for part in done.chunks))
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


@pytest.mark.parametrize("settings_", [{}, {"normalize": True}, {"truncate_dim": 2}])
def test_add_kept_vector_does_not_keep_the_batch_alive(settings_: dict[str, int]) -> None:
    assembler = Assembler(**settings_)  # type: ignore[arg-type]  # one table of keyword arguments
    assembler.expect(0, 1)
    (done,) = assembler.add([chunk(5)], np.ones((1, DIM), np.float32))
    assert done.embedding is not None
    assert done.embedding.base is None


def test_add_rows_missing_is_a_bug() -> None:
    assembler = Assembler()
    assembler.expect(0, 2)
    with pytest.raises(AssertionError, match="this is a bug"):
        assembler.add(pieces(0, [1, 1]), np.ones((1, DIM), np.float32))


def test_add_same_chunk_twice_is_a_bug() -> None:
    assembler = Assembler()
    assembler.expect(0, 2)
    first = pieces(0, [1, 1])[0]
    with pytest.raises(AssertionError, match="this is a bug"):
        assembler.add([first, first], np.ones((2, DIM), np.float32))


def test_discard_and_clear_forget_what_is_open() -> None:
    assembler = Assembler()
    for owner in range(3):
        assembler.expect(owner, 1)
    assembler.discard(0)
    assembler.discard(0)
    assert len(assembler) == 2
    assert assembler.add([chunk(3, owner=0)], np.ones((1, DIM), np.float32)) == []
    assembler.clear()
    assert len(assembler) == 0


def test_defect_sound_vector_has_none() -> None:
    assert defect(np.array([0, 1e-30], np.float32)) is None


def test_add_memory_that_runs_out_for_the_batch_is_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assembler, whole = Assembler(), Assembler._usable_rows

    def narrow(self: Assembler, vectors: np.ndarray) -> list[np.ndarray | None]:
        if len(vectors) > 2 or (vectors[:, 0] == 5).any():
            raise MemoryError
        return whole(self, vectors)

    monkeypatch.setattr(Assembler, "_usable_rows", narrow)
    for owner in range(1, 8):
        assembler.expect(owner, 1)
    vectors = np.array([[owner, 1, 1, 1] for owner in range(1, 8)], np.float32)
    done = assembler.add([chunk(5, owner=owner) for owner in range(1, 8)], vectors)
    assert sorted(text.owner for text in done) == list(range(1, 8))
    assert {text.owner: text.error for text in done if text.error} == {5: "its vector does not fit into memory"}
    assert all(text.embedding[0] == text.owner for text in done if text.embedding is not None)


def test_add_memory_that_runs_out_for_the_average_fails_its_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    assembler = Assembler()
    assembler.expect(1, 2)
    assembler.expect(2, 1)
    monkeypatch.setattr("asyncembed.assembly.weighted_average", exhausted)
    done = assembler.add([*pieces(1, [3, 4]), *pieces(2, [5])], np.ones((3, DIM), np.float32))
    errors = {text.owner: text.error for text in done}
    assert errors == {1: "the average of its 2 chunks does not fit into memory", 2: None}


def test_weighted_average_of_more_than_are_averaged_at_once_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    vectors, weights = rng.standard_normal((1300, DIM)).astype(np.float32), rng.integers(1, 256, 1300)
    expected = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(weighted_average(list(vectors), weights.tolist()), expected, rtol=1e-6)
