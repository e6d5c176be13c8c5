"""What a run adds to the ledger: nothing, if it brings nothing new; a key is the text's that came with it last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress

from asyncembed.records import EmbeddedText, text_id
from asyncembed.store.digests import DigestSet
from asyncembed.store.ledger import DONE, FAILED, KEY, Ledger, Row

_MOST_HELD = 10_000

Pair = tuple[str, str]
"""The id of a text, and a key that it came with."""


class Additions:
    """Finds the rows that the ledger lacks.

    Pairs that the ledger knows are held in 16 bytes each, keys that this run has given in as many; both are read when
    first needed, and a first run over distinct texts holds nothing. A pair that was superseded, and comes again, may be
    superseded again by the same input: who has its key is settled at the end, so that an input which gives one key to
    several texts adds nothing the second time.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._is_first = ledger.is_empty()
        self._is_loaded = self._is_first
        self._owners = DigestSet()  # pairs whose text had the key when this run began
        self._others = DigestSet()  # other pairs in the ledger
        self._given = DigestSet()  # keys that this run has written rows for
        self._failures = DigestSet()
        self._unsettled: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Additions is_first={self._is_first} unsettled={len(self._unsettled)}>"

    def rows(self, saved: Iterable[tuple[EmbeddedText, int]], others: Sequence[EmbeddedText]) -> list[Row]:
        """The rows of a micro-batch."""
        rows = []
        for record, size in saved:
            rows.append(Row(DONE, record.id, record.key, record.n_tokens, len(record.chunks), size))
        failed = [record for record in others if record.error is not None]
        if failed:
            rows += self._new_failures(failed)
        own = [(row.id, row.key) for row in rows if row.key is not None]
        self._give([key for _, key in own])
        rows += self._claims([(record.id, record.key) for record in others if record.key is not None], own)
        return rows if len(self._unsettled) < _MOST_HELD else rows + self.settle()

    def settle(self) -> list[Row]:
        """Rows for keys whose owner was left open, where it is another than before."""
        pairs = [(identity, key) for key, identity in self._unsettled.items()]
        self._unsettled = {}
        had, given = self._known(self._owners, pairs), self._were_given(pairs)
        pairs = [pair for pair, had_it, again in zip(pairs, had, given, strict=True) if again or not had_it]
        self._give([key for _, key in pairs])
        return [Row(KEY, *pair) for pair in pairs]

    def _claims(self, pairs: Sequence[Pair], own: Iterable[Pair]) -> Iterator[Row]:
        """Rows for keys that came with a text that is saved already."""
        if not pairs:
            return
        self._load()
        had, known, given = self._known(self._owners, pairs), self._known(self._others, pairs), self._were_given(pairs)
        new, mine = dict[Pair, None](), set(own)
        for pair, had_it, is_known, again in zip(pairs, had, known, given, strict=True):
            identity, key = pair
            # 1. nothing new, as far as the key was not given to another   2. it may be: settled at the end   3. new
            if (pair in mine or (had_it and not again)) and key not in self._unsettled:
                continue
            if had_it or is_known or pair in new or key in self._unsettled:
                self._unsettled[key] = identity
            else:
                new[pair] = None
                yield Row(KEY, identity, key)
        self._others.add_many([_digest(*pair) for pair in new])
        self._give([key for _, key in new], forget=False)

    def _give(self, keys: Sequence[str], *, forget: bool = True) -> None:
        """Keys of which rows are written now."""
        if forget:
            for key in keys:
                self._unsettled.pop(key, None)
        if keys and not self._is_first:
            self._given.add_many(list(map(text_id, keys)))

    def _new_failures(self, failed: Sequence[EmbeddedText]) -> Iterator[Row]:
        self._load()
        digests = [_digest(one.id, one.error or "", one.key or "") for one in failed]
        known = self._failures.contains_many(digests)
        self._failures.add_many(digests)
        for one in compress(failed, (not is_known for is_known in known)):
            yield Row(FAILED, one.id, one.key, one.n_tokens, len(one.chunks), None, one.error)

    def _were_given(self, pairs: Sequence[Pair]) -> list[bool]:
        return self._given.contains_many([text_id(key) for _, key in pairs])

    @staticmethod
    def _known(pairs: DigestSet, asked: Sequence[Pair]) -> list[bool]:
        return pairs.contains_many([_digest(*pair) for pair in asked])

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        self._owners = DigestSet(_digest(identity, key) for key, identity in self._ledger.owners())
        self._others = DigestSet(
            digest for digest in (_digest(*pair) for pair in self._ledger.pairs()) if digest not in self._owners
        )
        self._failures = DigestSet(
            _digest(row.id, row.error or "", row.key or "") for row in self._ledger.texts() if row.kind == FAILED
        )


def _digest(*parts: str) -> str:
    return text_id("\0".join(parts))
