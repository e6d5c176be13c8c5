"""DigestSet against a Python set."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.store import digests
from asyncembed.store.digests import DigestSet

# Few distinct words, so that ids share their first, their second, or both words of 8 bytes.
_words = st.sampled_from(["0" * 16, "f" * 16, "0" * 15 + "1", "8" + "0" * 15])
_ids = st.tuples(_words, _words).map(
    lambda pair: "".join(pair) + hashlib.sha256("".join(pair).encode()).hexdigest()[:32]
)
_random_ids = st.integers(0, 400).map(lambda n: hashlib.sha256(str(n).encode()).hexdigest())
_batches = st.lists(st.lists(_ids | _random_ids, max_size=40), max_size=12)


@given(batches=_batches, asked=st.lists(_ids | _random_ids, max_size=60), recent=st.sampled_from([1, 3, 8, 1000]))
@settings(deadline=None)
def test_digest_set_any_batches_answers_like_a_set(batches: list[list[str]], asked: list[str], recent: int) -> None:
    before, digests._RECENT = digests._RECENT, recent
    try:
        model: set[str] = set()
        tested = DigestSet()
        for batch in batches:
            tested.add_many(batch)
            model.update(batch)
            assert len(tested) == len(model)
            assert tested.contains_many(asked) == [identity in model for identity in asked]
        assert all(identity in tested for identity in model)
    finally:
        digests._RECENT = before


def test_digest_set_many_ids_take_16_bytes_each() -> None:
    known = DigestSet(f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}{n:048x}" for n in range(100_000))
    assert len(known) == 100_000
    assert known.nbytes <= 16 * 100_000
    assert not known.contains_many(["e" * 64])[0]


def test_digest_set_what_is_no_id_is_not_in_it_and_cannot_be_added() -> None:
    known = DigestSet(["a" * 64])
    assert "a" * 63 not in known
    assert 7 not in known
    with pytest.raises(ValueError, match="64 hex digits"):
        known.add_many(["a" * 62])
    assert known.contains_many([]) == []
