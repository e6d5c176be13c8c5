"""Which keys of which texts the folder knows, so that a run that adds none writes none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncembed.records import text_id
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import keys_of, parse
from asyncembed.sinks.folder import StorePaths
from asyncembed.sinks.index import index_entries
from asyncembed.sinks.journal import journal_lines

Pair = tuple[str, str]


class KnownKeys:
    """Pairs of text and key, 16 bytes each, read from index and journal when first asked for.

    A first run over distinct texts never asks, and holds nothing.
    """

    def __init__(self, paths: StorePaths) -> None:
        self._paths = paths
        self._digests: DigestSet | None = None

    def new(self, asked: Sequence[Pair], noted: Sequence[Pair]) -> list[Pair]:
        """Those of the pairs asked for that the folder does not know, once each; they count as known from now on.

        Args:
            asked: Pairs to look up.
            noted: Pairs that are about to be written anyway.
        """
        if self._digests is None:
            if not asked:
                return []
            self._digests = DigestSet(map(_digest, self._stored()))
        self._digests.update(map(_digest, noted))
        distinct = list(dict.fromkeys(asked))
        known = self._digests.contains_many([_digest(pair) for pair in distinct])
        fresh = [pair for pair, there in zip(distinct, known, strict=True) if not there]
        self._digests.update(map(_digest, fresh))
        return fresh

    def _stored(self) -> Iterator[Pair]:
        for identity, entry in index_entries(self._paths.index):
            for key in keys_of(entry):
                yield identity, key
        for raw, line in journal_lines(self._paths.journal):
            for key in keys_of(parse(line) or {}):
                yield raw.decode(), key


def _digest(pair: Pair) -> str:
    return text_id("\0".join(pair))
