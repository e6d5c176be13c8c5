"""The synchronous core of the JSON store: everything here blocks, and is called from one thread."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import compress

from asyncembed.errors import CorruptRecordError, StoreError, StoreMismatchError
from asyncembed.records import EmbeddedText, Rejected
from asyncembed.sinks.codec import encode_json
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import completed_line, failed_line
from asyncembed.sinks.flushing import flush_folder
from asyncembed.sinks.folder import (
    StorePaths,
    append_lines,
    make_folders,
    record_ids,
    remove,
    storage_errors,
    temporary_of,
    wipe,
)
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import IndexState, index_state, write_index
from asyncembed.sinks.journal import Journal, journal_header
from asyncembed.sinks.keys import KnownKeys, Pair
from asyncembed.sinks.lock import FolderLock
from asyncembed.sinks.origin import check_origin, check_orphans, check_ours, is_of
from asyncembed.sinks.placing import RecordFiles
from asyncembed.sinks.record_file import StoredText, encode_record, read_record
from asyncembed.sinks.recovery import listed_ids, repair, salvage_index

_JOURNAL_FLOOR = 1 << 20  # bytes of journal below which the index is not rewritten before the end
_LOST = (errno.ENOENT, errno.EIO, errno.EISDIR)  # this one file cannot be read; writing it anew can help


class FolderWriter:
    """Writes one folder while it holds its lock: open, claim, commit, close."""

    def __init__(self, paths: StorePaths, *, overwrite: bool = False, durable: bool = False) -> None:
        self.paths = paths
        self._durable = durable
        self.header: Header | None = None
        self.done = DigestSet()  # by earlier runs; not changed after `open`
        self._written = DigestSet()  # by this one
        self._lock = FolderLock(paths)
        self._journal = Journal(paths.journal, durable=durable)
        self._index = IndexState()
        self._keys = KnownKeys(paths)
        self._wipe = overwrite
        self._held: list[EmbeddedText] = []  # failed texts, until one that is embedded makes the old results go
        self._stale = False  # the index names texts that are gone, or lacks some that are there
        self._digest = ""  # of what this run's vectors are made with
        self._claimed = False
        self._broken = False

    def open(self, *, scan: bool = True) -> None:
        """Take the lock, learn what the folder was made with, and find out what is done.

        With `overwrite`, nothing counts as done; the earlier results are removed when the first text is embedded, so a
        run that comes to nothing destroys nothing.

        Raises:
            StoreLockedError: Another job writes to the folder.
            StoreError: The folder cannot be used, or holds a file of another program under a name of ours.
        """
        paths = self.paths
        check_ours(paths)
        make_folders(paths, durable=self._durable)
        self._lock.acquire()
        with storage_errors(paths.root):
            for path in (temporary_of(paths.index), temporary_of(paths.journal)):
                remove(path)
            if self._wipe:
                return
            self._index = index_state(paths.index)
            self.header = self._index.header or journal_header(paths.journal)
        if scan:
            self.scan()

    def scan(self) -> None:
        """Find out what is done, and repair what a killed run left.

        Raises:
            StoreError: The folder cannot be used.
        """
        paths = self.paths
        if self._wipe:
            return
        with storage_errors(paths.root):
            if self._index.exists and not self._index.intact:
                salvage_index(paths, self.header)
            if not self._journal.exists():
                self.done = listed_ids(paths)
                self._stale = len(self.done) != self._index.n_completed
            if self._stale or self._journal.exists():
                self.done = DigestSet()  # not held beside those that the repair makes
                self.done = repair(paths, self._index, self._journal, self.header)

    def claim(self, fingerprint: Mapping[str, object], made_with: Mapping[str, object]) -> None:
        """Compare the folder's fingerprint with this run's, or give a new folder its header.

        A folder in which no text is stored takes any fingerprint.

        Raises:
            StoreMismatchError: The folder's vectors were made with other weights or options.
            StoreError: The folder cannot be written to.
        """
        ours = Header.of(fingerprint, made_with)
        self._claim(ours)
        self._digest = ours.digest()
        with storage_errors(self.paths.errors):
            remove(self.paths.errors)  # the last run's; not before this one is sure to go on
        self._claimed = True

    def _claim(self, ours: Header) -> None:
        with storage_errors(self.paths.root):
            if self._wipe:  # not before there is something to put in the place of what is there: see `commit`
                self.header = ours
                return
            if self.header is not None and not self.done and self.header.fingerprint != ours.fingerprint:
                self._journal.remove()
                self._index, self.header = IndexState(), None
            if self.header is None:
                check_orphans(self.paths, ours, len(self.done))
                self.header = ours
                self._rewrite_index()
            else:
                self.header.compare(ours, self.paths.root)

    def written(self, ids: Sequence[str]) -> list[bool]:
        """Whether this run has saved each text."""
        return self._written.contains_many(ids)

    def read_many(self, ids: Sequence[str]) -> list[StoredText | CorruptRecordError]:
        """The stored texts, each checked; an error in the place of one that is damaged or gone."""
        return [self._read(identity) for identity in ids]

    def some(self, n_texts: int) -> list[StoredText]:
        """A few texts of earlier runs, at random from those that the folder lists first, of those that are right."""
        listed = next(record_ids(self.paths), []) if self.done else []
        found: list[StoredText] = []
        for identity in random.sample(listed, min(n_texts, len(listed))):
            with suppress(OSError, CorruptRecordError):
                stored = read_record(identity, self.paths.record(identity))
                if self.header is None or is_of(stored, self.header):
                    found.append(stored)
        return found

    def commit(self, records: Sequence[EmbeddedText]) -> None:
        """Save a micro-batch: each file whole, then one append to the journal.

        Raises:
            StoreError: The disk or folder does not take it; what was saved before stays.
        """
        if not self._claimed:
            raise AssertionError("records are committed before the folder was claimed: this is a bug")
        try:
            with storage_errors(self.paths.root):
                self._commit(records)
        except BaseException:
            self._broken = True
            raise

    def reject(self, rows: Sequence[tuple[str | None, Rejected]]) -> None:
        """Write skipped rows, each with its place, to `errors.jsonl`.

        Raises:
            StoreError: It cannot be written.
        """
        lines = [
            encode_json({"place": place, "key": row.key, "reason": row.reason, "content": row.content}) + b"\n"
            for place, row in rows
        ]
        if lines:
            with storage_errors(self.paths.errors):
                append_lines(self.paths.errors, lines)

    def close(self, complete: bool = True) -> None:
        """Complete the index if anything changed, and release the lock whatever happens. Idempotent.

        Raises:
            StoreError: The index could not be written; journal and files still hold everything.
        """
        if not self._lock.held:
            return
        try:
            if self._held:
                with storage_errors(self.paths.errors):
                    append_lines(self.paths.errors, [_error_line(record) for record in self._held])
            is_ours = self._claimed and not self._wipe  # what an overwriting run has left alone stays as it was
            if complete and is_ours and not self._broken and (self._stale or self._journal.exists()):
                with storage_errors(self.paths.root):
                    self._rewrite_index()
        finally:
            self._journal.close()
            self._lock.release()

    def _commit(self, records: Sequence[EmbeddedText]) -> None:
        if self._wipe:
            self._held.extend(records)
            if all(record.error is not None for record in records):
                return
            wipe(self.paths, durable=self._durable)
            self._wipe = False
            self._rewrite_index()
            records, self._held = self._held, []
        batch = _Batch()
        with RecordFiles(self.paths.data, durable=self._durable) as files:
            self._save(records, batch, files)
        batch.lines += self._keys.lines(batch.other_keys, batch.own_keys, is_first_run=not self.done)
        if batch.lines:
            self._journal.start(self.header)
            self._journal.append(b"".join(batch.lines))
        if batch.errors:
            append_lines(self.paths.errors, batch.errors)
        self._written.add_many(batch.fresh)
        if self._journal.size > max(_JOURNAL_FLOOR, self._index.size):
            self._rewrite_index()

    def _save(self, records: Sequence[EmbeddedText], batch: _Batch, files: RecordFiles) -> None:
        """Write the files of a micro-batch and note what the journal is to say about it."""
        texts = [record.id for record in records if record.id]
        written = set(compress(texts, self._written.contains_many(texts)))
        for record in records:
            pair = [(record.id, record.key)] if record.key is not None else []
            # 1. failed   2. its file is there: at most one more key   3. new
            if record.error is not None:
                batch.errors.append(_error_line(record))
                if record.id and record.id not in written and record.id not in self.done:
                    n_chunks = len(record.chunks)
                    line = failed_line(record.id, record.n_tokens, n_chunks, record.error, record.key)
                    batch.lines.append(line)
                    batch.own_keys.extend(pair)
            elif record.cached or record.id in written:
                batch.other_keys.extend(pair)
            else:
                data = encode_record(record, self._digest)
                self._journal.start(self.header)
                files.write(record.id, data)
                line = completed_line(record.id, record.n_tokens, len(record.chunks), len(data), record.key)
                batch.lines.append(line)
                batch.own_keys.extend(pair)
                batch.fresh.append(record.id)
                written.add(record.id)

    def _rewrite_index(self) -> None:
        """Merge index and journal into a new index and begin a new journal with the next commit."""
        if self.header is None:
            raise AssertionError("the index is written before the folder was claimed: this is a bug")
        old = self.paths.index if self._index.intact else None
        self._index = write_index(self.paths.index, self.header, old, self.paths.journal, self._have_files)
        if self._durable:
            flush_folder(self.paths.root)  # before the journal goes, or a power cut may leave neither
        self._journal.remove()
        self._stale = False

    def _have_files(self, ids: Sequence[str]) -> list[bool]:
        before, now = self.done.contains_many(ids), self._written.contains_many(ids)
        return [there or new for there, new in zip(before, now, strict=True)]

    def _read(self, identity: str) -> StoredText | CorruptRecordError:
        path = self.paths.record(identity)
        try:
            with storage_errors(path):
                stored = read_record(identity, path)
                if self._claimed and self.header is not None:
                    check_origin(self.paths, stored, self.header)
                return stored
        except StoreMismatchError as error:  # put there by hand: made anew, it fits
            return CorruptRecordError(str(error))
        except CorruptRecordError as error:
            return error
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _LOST:
                return CorruptRecordError(str(error))
            raise


class _Batch:
    """What a micro-batch adds: lines for journal and errors, ids of new files, keys with and without a status."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.errors: list[bytes] = []
        self.fresh: list[str] = []
        self.own_keys: list[Pair] = []
        self.other_keys: list[Pair] = []


def _error_line(record: EmbeddedText) -> bytes:
    line = {
        "index": record.index,
        "id": record.id,
        "key": record.key,
        "place": record.place,
        "reason": record.error,
        "text": record.text,
    }
    return encode_json(line) + b"\n"
