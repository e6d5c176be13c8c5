"""Changing a folder without a run: damaged files removed, the index made anew. Both hold the folder's lock."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.sinks.checking import Fault
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import FAILED, completed_line, keys_of, parse
from asyncembed.sinks.folder import StorePaths, record_ids, remove, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import foreign_entries, index_state, is_readable, merged_entries, write_index
from asyncembed.sinks.journal import Journal, journal_header
from asyncembed.sinks.lock import FolderLock
from asyncembed.sinks.origin import STRANGE, check_ours, is_of
from asyncembed.sinks.record_file import read_record
from asyncembed.sinks.recovery import listed_ids, salvage_index

_READ_BLOCK = 256  # files read between two appends


@dataclass(frozen=True, slots=True)
class Failure:
    """A text that no run could embed so far.

    Attributes:
        id: `text_id` of the text.
        reason: Why.
        keys: The keys it was given with.
    """

    id: str
    reason: str
    keys: tuple[str, ...]


def failures(paths: StorePaths) -> Iterator[Failure]:
    """The texts that failed, and that the next run tries again.

    Raises:
        StoreError: The folder cannot be read.
    """
    with storage_errors(paths.root):
        state = index_state(paths.index)
        entries = (
            ((identity.decode(), parse(body) or {}) for identity, body in merged_entries(paths.index, paths.journal))
            if state.intact
            else _entries_of_torn(paths, state.exists)
        )
        for identity, entry in entries:
            if entry.get("status") == FAILED:
                yield Failure(identity, str(entry.get("error", "")), tuple(keys_of(entry)))


def are_all_known(paths: StorePaths) -> bool:
    """Whether `failures` are all there were: False where the index that named them is gone, or torn.

    Raises:
        StoreError: The folder cannot be read.
    """
    with storage_errors(paths.root):
        state = index_state(paths.index)
        if not state.exists:
            return not any(record_ids(paths)) and not Journal(paths.journal).exists()
        return state.intact or is_readable(paths.index)


def remove_damaged(paths: StorePaths, faults: Iterable[Fault]) -> Iterator[Fault]:
    """Remove each file, as its fault is found, that the next run had better make anew; the index forgets it.

    Raises:
        StoreLockedError: A job is writing to the folder.
        StoreError: The folder cannot be read or written.
    """
    check_ours(paths)
    lock = FolderLock(paths)
    try:
        lock.acquire()
        n_removed = 0
        for fault in faults:
            if fault.removable:
                with storage_errors(fault.path):
                    remove(fault.path)
                n_removed += 1
            yield fault
        if n_removed:
            _forget_missing(paths)
    finally:
        lock.release()


def rebuild(paths: StorePaths) -> Iterator[Fault]:
    """Make the index anew from the files; keys and failures are kept as far as index and journal can be read.

    Files that are damaged or from elsewhere are left where they are, reported, and not listed.

    Raises:
        StoreLockedError: A job is writing to the folder.
        StoreError: The folder cannot be used, or nothing says what its texts were made with.
    """
    lock = FolderLock(paths)
    try:
        lock.acquire()
        with storage_errors(paths.root):
            state = index_state(paths.index)
            header = state.header or journal_header(paths.journal)
            if header is None:
                raise StoreError(
                    f"{paths.root}: index and journal are gone or cannot be read, so nothing says what its texts were "
                    "made with; run a job with the options that made them: it checks that they fit, and writes the "
                    "index"
                )
            if state.exists and not state.intact:
                salvage_index(paths, header)
            journal, whole = Journal(paths.journal), DigestSet()
            yield from _list_files(paths, header, journal, whole)
            journal.close()
            write_index(paths.index, header, paths.index if state.intact else None, paths.journal, whole.contains_many)
            journal.remove()
    finally:
        lock.release()


def _list_files(paths: StorePaths, header: Header, journal: Journal, whole: DigestSet) -> Iterator[Fault]:
    """Journal every file that is whole and belongs here."""
    journal.start(header)
    for block in record_ids(paths, clean=True, only_files=False):
        for at in range(0, len(block), _READ_BLOCK):
            lines, good = [], []
            for identity in block[at : at + _READ_BLOCK]:
                path = paths.record(identity)
                try:
                    stored, size = read_record(identity, path), os.stat(path).st_size
                except CorruptRecordError as error:
                    yield Fault(path, error.reason, True)
                    continue
                if not is_of(stored, header):
                    yield Fault(path, STRANGE, True)
                    continue
                lines.append(completed_line(identity, stored.n_tokens, len(stored.chunks), size, None))
                good.append(identity)
            if lines:
                journal.append(b"".join(lines))
                whole.add_many(good)


def _forget_missing(paths: StorePaths) -> None:
    """Write the index without the texts whose file is gone, where there is one to write."""
    with storage_errors(paths.root):
        state = index_state(paths.index)
        if state.header is None or not state.intact:
            return  # the next run, or a rebuild, puts it in order
        write_index(paths.index, state.header, paths.index, paths.journal, listed_ids(paths).contains_many)
        remove(paths.journal)


def _entries_of_torn(paths: StorePaths, exists: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """What the journal says, and then what can be read of an index that is not as it was written."""
    told = DigestSet()
    for identity, body in merged_entries(None, paths.journal):
        told.add_many([identity.decode()])
        yield identity.decode(), parse(body) or {}
    for name, entry in foreign_entries(paths.index) if exists else ():
        if name not in told:
            yield name, entry
