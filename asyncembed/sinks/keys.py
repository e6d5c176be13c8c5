"""Which keys of which texts the folder knows: a run that adds none writes none, one that moves some says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncembed.records import text_id
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import is_moved, key_line, keys_of, moved_line, parse
from asyncembed.sinks.folder import StorePaths
from asyncembed.sinks.index import index_entries
from asyncembed.sinks.journal import journal_lines

Pair = tuple[str, str]
"""The id of a text, and a key that it came with."""


class KnownKeys:
    """Keys, and pairs of text and key, 16 bytes each, read from index and journal when first needed.

    A key belongs to the text that came with it last. A first run over distinct texts never asks, and holds nothing: a
    key that its input gives to two texts stays with both.
    """

    def __init__(self, paths: StorePaths) -> None:
        self._paths = paths
        self._pairs: DigestSet | None = None
        self._keys = DigestSet()
        self._moved: dict[str, str] = {}

    def lines(self, others: Sequence[Pair], own: Sequence[Pair], *, is_first_run: bool) -> list[bytes]:
        """What the journal has to say about keys, behind the lines of the texts themselves."""
        if self._pairs is None:
            if is_first_run and not others:
                return []
            self._pairs = self._load()
        said_already = set(own)
        pairs = list(dict.fromkeys((*own, *others)))
        pair_digests, key_digests = [_digest(*pair) for pair in pairs], [_digest(key) for _, key in pairs]
        known_pairs, known_keys = self._pairs.contains_many(pair_digests), self._keys.contains_many(key_digests)
        self._pairs.add_many(pair_digests)
        self._keys.add_many(key_digests)
        found: list[bytes] = []
        given: dict[str, str] = {}
        for (identity, key), pair_is_known, key_is_known in zip(pairs, known_pairs, known_keys, strict=True):
            owner = given.get(key, self._moved.get(key))
            if owner != identity and (owner is not None or (key_is_known and not pair_is_known)):
                self._moved[key] = identity
                found.append(moved_line(identity, key))
            elif not pair_is_known and (identity, key) not in said_already:
                found.append(key_line(identity, key))
            given[key] = identity
        return found

    def _load(self) -> DigestSet:
        self._keys.update(_digest(key) for _, key in self._stored())
        return DigestSet(_digest(*pair) for pair in self._stored())

    def _stored(self) -> Iterator[Pair]:
        for identity, entry in index_entries(self._paths.index):
            for key in keys_of(entry):
                yield identity, key
        for raw, data in journal_lines(self._paths.journal):
            line = parse(data) or {}
            for key in keys_of(line):
                if is_moved(line):
                    self._moved[key] = raw.decode()
                yield raw.decode(), key


def _digest(*parts: str) -> str:
    return text_id("\0".join(parts))
