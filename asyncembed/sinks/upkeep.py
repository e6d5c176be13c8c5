"""Checks a folder and changes it without a run: damaged files removed, the index made anew, under its lock."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import FAILED, completed_line, is_completed, keys_of, parse
from asyncembed.sinks.folder import StorePaths, is_folder, record_ids, remove, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import foreign_entries, index_state, is_readable, merged_entries, write_index
from asyncembed.sinks.journal import Journal, journal_header
from asyncembed.sinks.lock import FolderLock
from asyncembed.sinks.origin import STRANGE, Origins, check_ours, is_of
from asyncembed.sinks.record_file import StoredText, read_record
from asyncembed.sinks.recovery import listed_ids, salvage_index

_UNTOLD = (
    "nothing says which is right, so none is removed: move away what does not belong here, and a job with the options "
    "that made the rest makes the index anew"
)
_REBUILD = "asyncembed-store rebuild makes it anew"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong in a folder.

    Attributes:
        path: The file.
        reason: What is wrong with it, and what becomes of it.
        removable: It is a per-text file that the next run makes anew once it is gone.
    """

    path: str
    reason: str
    removable: bool = False


class FolderCheck:
    """Reads every file of a folder and says what is wrong. Changes nothing, needs no lock.

    Attributes:
        n_files: Per-text files read so far.
        n_unlisted: Of those, whole ones that neither index nor journal knows; the next run takes them in.
    """

    def __init__(self, paths: StorePaths) -> None:
        self.n_files = 0
        self.n_unlisted = 0
        self._paths = paths
        self._header: Header | None = None
        self._origins = Origins()

    def __repr__(self) -> str:
        return f"<FolderCheck {self._paths.root!r} n_files={self.n_files}>"

    def faults(self) -> Iterator[Fault]:
        """All that is wrong, as it is found.

        Raises:
            StoreError: The folder cannot be read, or a newer version of this library wrote it.
        """
        with storage_errors(self._paths.root):
            state = index_state(self._paths.index)
            self._header = state.header or journal_header(self._paths.journal)
            if state.exists and not state.intact and self._header is not None:
                yield Fault(self._paths.index, f"is torn or was reformatted; {_REBUILD}")
            listed = DigestSet()
            for identity, body in merged_entries(self._paths.index if state.intact else None, self._paths.journal):
                if is_completed(body):
                    listed.add_many([identity.decode()])
                    yield from self._check(identity.decode(), parse(body))
            for block in record_ids(self._paths, only_files=False):
                known = listed.contains_many(block)
                for name in (name for name, there in zip(block, known, strict=True) if not there):
                    self.n_unlisted += 1
                    yield from self._check(name, None)
            for path, reason in self._origins.strangers(self._paths):
                yield Fault(path, f"{reason}; {_UNTOLD}")
            if self._header is None and (self.n_files or state.exists):
                what = "cannot be read" if state.exists else "is gone"
                reason = (
                    f"{what}, and with it what the texts were made with; the next run writes it, if it makes the same"
                )
                yield Fault(self._paths.index, reason)

    def _check(self, identity: str, entry: dict[str, Any] | None) -> Iterator[Fault]:
        path = self._paths.record(identity)
        try:
            stored = read_record(identity, path)
        except FileNotFoundError:
            if entry is not None:
                yield Fault(path, "is gone; the next run over its text makes it again")
            return
        except CorruptRecordError as error:
            self.n_files += 1
            yield Fault(path, error.reason, not is_folder(path))
            return
        self.n_files += 1
        fault = self._misfit(stored, entry or {}, path)
        if fault is not None:
            yield fault

    def _misfit(self, stored: StoredText, entry: dict[str, Any], path: str) -> Fault | None:
        """What is wrong with a file that can be read; None if nothing is.

        A file may go for what it differs in only where a header says what is right: of files that merely differ from
        each other, any may be the good ones.
        """
        dim = len(stored.embedding)
        told = self._header.fingerprint.get("dim") if self._header is not None else None
        # 1. damaged by itself   2. another length   3. other options   4. not what the index says
        if not stored.chunks:
            return Fault(path, "it has no chunks", True)
        if any(chunk.start < 0 or chunk.n_tokens < 0 for chunk in stored.chunks) or stored.n_tokens < 0:
            return Fault(path, "a count in it is below 0", True)
        if told is None:
            self._origins.add(stored)
        elif dim != told:
            return Fault(path, f"its vector has {dim} numbers, the folder's have {told}", True)
        if self._header is not None and not is_of(stored, self._header):
            return Fault(path, STRANGE, True)
        size = os.stat(path).st_size
        is_as_saved = entry.get("size") == size
        found = {"n_chunks": len(stored.chunks), "n_tokens": stored.n_tokens, "size": size}
        for name, number in found.items():
            if entry.get(name, number) != number:
                if is_as_saved:
                    reason = f"says that {name} of {stored.id} is {entry[name]}, its file says {number}; {_REBUILD}"
                    return Fault(self._paths.index, reason)
                reason = f"its {name} is {number}, the index says {entry[name]}"
                return Fault(path, reason, self._header is not None)
        return None


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
