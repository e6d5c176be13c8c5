"""A set of text ids in 16 bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

_Words = npt.NDArray[np.uint64]
_ID_LENGTH = 64
_RECENT = 8192  # additions kept in a Python set (about 1 MB) before they become a sorted array
_BLOCK = 8192


class DigestSet:
    """Text ids (64 hex digits), kept as the first 16 bytes of each digest.

    Two texts share those 16 bytes with a chance of n² / 2¹²⁹: never. The bytes lie in sorted arrays of two words, each
    at least twice as long as the next, so an addition is moved O(log n) times and a question asks O(log n) arrays; the
    newest additions wait in a small Python set.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._levels: list[tuple[_Words, _Words]] = []
        self._recent: set[bytes] = set()
        self.update(ids)

    def __len__(self) -> int:
        return sum(len(high) for high, _ in self._levels) + len(self._recent)

    def __contains__(self, text_id: object) -> bool:
        return isinstance(text_id, str) and len(text_id) == _ID_LENGTH and self.contains_many([text_id])[0]

    def __repr__(self) -> str:
        return f"<DigestSet of {len(self)} ids, {self.nbytes} bytes in {len(self._levels)} arrays>"

    @property
    def nbytes(self) -> int:
        """Bytes of the sorted arrays."""
        return sum(high.nbytes + low.nbytes for high, low in self._levels)

    def update(self, ids: Iterable[str]) -> None:
        """Add a stream of ids, however long, in blocks."""
        iterator = iter(ids)
        while block := list(islice(iterator, _BLOCK)):
            self.add_many(block)

    def add_many(self, ids: Sequence[str]) -> None:
        """Add ids; those that are there already change nothing."""
        if not ids:
            return
        raw = _digests(ids)
        known = self._in_levels(raw)
        self._recent.update(raw[at * 32 : at * 32 + 16] for at in np.flatnonzero(~known).tolist())
        if len(self._recent) >= _RECENT:
            self._settle()

    def contains_many(self, ids: Sequence[str]) -> list[bool]:
        """Whether each id is in the set, in the order given."""
        if not ids:
            return []
        raw = _digests(ids)
        found: list[bool] = self._in_levels(raw).tolist()
        if self._recent:
            recent = self._recent
            found = [known or raw[at * 32 : at * 32 + 16] in recent for at, known in enumerate(found)]
        return found

    def _in_levels(self, raw: bytes) -> npt.NDArray[np.bool_]:
        words = np.frombuffer(raw, ">u8").reshape(-1, 4)
        high, low = words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
        found = np.zeros(len(high), np.bool_)
        for level in self._levels:
            found |= _lookup(level, high, low)
        return found

    def _settle(self) -> None:
        """Turn the recent additions into a sorted array and merge arrays of like size."""
        words = np.frombuffer(b"".join(self._recent), ">u8").reshape(-1, 2)
        self._recent = set()
        self._levels.append(_sorted(words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)))
        while len(self._levels) > 1 and len(self._levels[-2][0]) < 2 * len(self._levels[-1][0]):
            (high_b, low_b), (high_a, low_a) = self._levels.pop(), self._levels.pop()
            high = np.concatenate((high_a, high_b))
            del high_a, high_b  # at a million ids each of these is megabytes: none outlives its use
            low = np.concatenate((low_a, low_b))
            del low_a, low_b
            self._levels.append(_sorted(high, low))


def _digests(ids: Sequence[str]) -> bytes:
    """The 32 bytes of each id, one after the other."""
    raw = bytes.fromhex("".join(ids))
    if len(raw) != 32 * len(ids):
        raise ValueError("a text id is 64 hex digits")
    return raw


def _sorted(high: _Words, low: _Words) -> tuple[_Words, _Words]:
    order = np.argsort(high, kind="stable")
    return high[order], low[order]


def _lookup(level: tuple[_Words, _Words], high: _Words, low: _Words) -> npt.NDArray[np.bool_]:
    """Which pairs of words are in a level; equal high words lie side by side, their low words in no order."""
    level_high, level_low = level
    at = np.searchsorted(level_high, high)
    found = np.zeros(len(high), np.bool_)
    pending = np.flatnonzero(at < len(level_high))
    while len(pending):
        place = at[pending]
        alike = level_high[place] == high[pending]
        pending, place = pending[alike], place[alike]
        hit = level_low[place] == low[pending]
        found[pending[hit]] = True
        pending = pending[~hit]  # same first word, other second word: look at the neighbour
        at[pending] += 1
        pending = pending[at[pending] < len(level_high)]
    return found
