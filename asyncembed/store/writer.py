"""A folder of results that is written to: one writer at a time; what is saved is found again however a run ended."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import compress

from asyncembed.errors import CorruptRecordError, StoreError, StoreMismatchError
from asyncembed.records import EmbeddedText, Rejected
from asyncembed.store.digests import DigestSet
from asyncembed.store.files import (
    StorePaths,
    append_lines,
    encode_json,
    flush_folder,
    make_folders,
    remove,
    storage_errors,
    temporary_of,
)
from asyncembed.store.format import Format, StoredText
from asyncembed.store.formats import format_of
from asyncembed.store.index import MOST_EXPORTED, export, header_of, is_earlier, is_whole, take_over
from asyncembed.store.keys import Additions
from asyncembed.store.ledger import DONE, REMOVED, Header, Ledger, LedgerDamaged, Row, remove_ledger
from asyncembed.store.lock import FolderLock, check_ours
from asyncembed.wording import plural

_log = logging.getLogger("asyncembed")
_READ_BLOCK = 256  # files read before their rows are written
_LOST = (errno.ENOENT, errno.EIO)  # this one file cannot be read; writing it anew can help


def check_origin(texts: Format, stored: StoredText, header: Header) -> None:
    """Refuse a file from elsewhere in a folder that knows what it was made with."""
    if stored.fingerprint not in (None, header.digest()):
        raise StoreMismatchError(
            f"{texts.place(stored.id)}: was made with other weights or options than the rest of the folder; move it "
            "away, or let asyncembed-store verify --remove-damaged do it"
        )


def check_orphans(texts: Format, root: str, ours: Header) -> None:
    """Compare the texts of a folder that lost its ledger and its index with a run that is to go on with it.

    Each file carries a digest of what it was made with; of those without one the length of the vector is compared, and
    a warning says so.
    """
    n_read = n_unknown = n_strange = 0
    shown: StoredText | None = None
    for identity in (identity for block in texts.ids() for identity in block):
        try:
            stored = texts.read(identity)
        except (CorruptRecordError, FileNotFoundError):
            continue  # damaged since it was listed: found when it is read
        n_read += 1
        n_unknown += stored.fingerprint is None
        if not ours.covers(stored):
            n_strange += 1
            shown = shown or stored
    if shown is not None:
        dim = ours.fingerprint.get("dim", len(shown.embedding))
        lengths = f" ({len(shown.embedding)} numbers there, {dim} here)" if dim != len(shown.embedding) else ""
        raise StoreMismatchError(
            f"{root}: ledger and index are gone, and {n_strange:,} of {plural(n_read, 'file')} "
            f"{'was' if n_strange == 1 else 'were'} made with other weights or options than this run's, such as "
            f"{texts.place(shown.id)}{lengths}; use the options that made them, move them away, choose another save "
            "path, or overwrite"
        )
    if n_unknown:
        _log.warning(
            "%s: ledger and index are gone, so what %d of its texts were embedded with is not known; "
            "they are taken to be made with this run's model and options",
            root,
            n_unknown,
        )


class FolderWriter:
    """Writes one folder while it holds its lock: open, claim, commit, close. Everything here blocks, in one thread."""

    def __init__(self, paths: StorePaths, *, overwrite: bool = False, durable: bool = False) -> None:
        self.paths = paths
        self.header: Header | None = None
        self.done = DigestSet()  # by earlier runs; not changed after `open`
        self._durable = durable
        self._texts: Format = format_of(paths, durable=durable)
        self._written = DigestSet()  # by this run
        self._n_new = 0  # of those, the ones that no earlier run had saved
        self._lock = FolderLock(paths)
        self._ledger: Ledger | None = None
        self._additions: Additions | None = None
        self._wipe = overwrite
        self._held: list[EmbeddedText] = []  # failed texts, until one that is embedded makes the old results go
        self._stale = False  # ledger or index are to be completed, though this run may add nothing
        self._digest = ""  # of what this run's vectors are made with
        self._claimed = False
        self._broken = False

    def open(self, *, scan: bool = True) -> None:
        """Take the lock, learn what the folder was made with, and find out what is done.

        With `overwrite`, nothing counts as done; the earlier results are removed when the first text is embedded, so a
        run that comes to nothing destroys nothing.
        """
        paths = self.paths
        check_ours(paths)
        make_folders(paths, durable=self._durable)
        self._lock.acquire()
        with storage_errors(paths.root):
            remove(temporary_of(paths.index))
            if self._wipe:
                return
            if os.path.exists(paths.ledger):
                try:
                    self._ledger = Ledger.write(paths.ledger, durable=self._durable)
                    self.header = self._ledger.header()
                    if self.header is None and self._ledger.is_empty():
                        raise LedgerDamaged("it is empty")
                except LedgerDamaged as error:
                    self._lose_ledger(error)
            if self._ledger is None:
                self.header = header_of(paths)
        if scan:
            self.scan()

    def scan(self) -> None:
        """Find out what is done, and put in order what a killed run left."""
        if self._wipe:
            return
        with storage_errors(self.paths.root):
            try:
                self._scan()
            except LedgerDamaged as error:
                self._lose_ledger(error)
                self._scan()

    def claim(self, fingerprint: Mapping[str, object], made_with: Mapping[str, object]) -> None:
        """Compare the folder's fingerprint with this run's, or record it in a new folder.

        A folder in which no text is stored takes any fingerprint.
        """
        ours = Header.of(fingerprint, made_with)
        with self._guarded():
            if self._wipe:  # not before there is something to put in the place of what is there: see `commit`
                self.header = ours
            elif self.header is not None and (self.done or self.header.fingerprint == ours.fingerprint):
                self.header.compare(ours, self.paths.root)
            else:
                if self.header is not None:
                    self._drop_ledger()
                if self.done:
                    check_orphans(self._texts, self.paths.root, ours)
                self._begin_folder(ours)
            self._digest = ours.digest()
            remove(self.paths.errors)  # the last run's; not before this one is sure to go on
        self._claimed = True

    def written(self, ids: Sequence[str]) -> list[bool]:
        """Whether this run has saved each text."""
        return self._written.contains_many(ids)

    def read_many(self, ids: Sequence[str]) -> list[StoredText | CorruptRecordError]:
        """The stored texts, each checked; an error in the place of one that is damaged or gone."""
        return [self._read(identity) for identity in ids]

    def some(self, n_texts: int) -> list[StoredText]:
        """A few texts of earlier runs, at random from those that the folder lists first, of those that are right."""
        listed = next(self._texts.ids(), []) if self.done else []
        found: list[StoredText] = []
        for identity in random.sample(listed, min(n_texts, len(listed))):
            with suppress(OSError, CorruptRecordError):
                stored = self._texts.read(identity)
                if self.header is None or self.header.covers(stored):
                    found.append(stored)
        return found

    def commit(self, records: Sequence[EmbeddedText]) -> None:
        """Save a micro-batch: each file whole, then their rows in one transaction."""
        if not self._claimed:
            raise AssertionError("records are committed before the folder was claimed: this is a bug")
        with self._guarded():
            self._commit(records)

    def reject(self, rows: Sequence[tuple[str | None, Rejected]]) -> None:
        """Write skipped rows, each with its place, to `errors.jsonl`."""
        lines = [
            encode_json({"place": place, "key": row.key, "reason": row.reason, "content": row.content}) + b"\n"
            for place, row in rows
        ]
        if lines:
            with storage_errors(self.paths.errors):
                append_lines(self.paths.errors, lines)

    def close(self, complete: bool = True) -> None:
        """Complete ledger and index if anything changed, and release the lock whatever happens. Idempotent."""
        if not self._lock.held:
            return
        is_ended = False
        try:
            if self._held:
                with storage_errors(self.paths.errors):
                    append_lines(self.paths.errors, [_error_line(record) for record in self._held])
            if self._ledger is not None and not self._broken:
                with storage_errors(self.paths.root):
                    if self._additions is not None:
                        self._ledger.append(self._additions.settle())
                    if complete:
                        self._complete(self._ledger)
                is_ended = complete
        except LedgerDamaged as error:  # all texts are saved: the next run makes it anew
            self._lose_ledger(error)
        finally:
            if self._ledger is not None:
                self._ledger.close(plain=is_ended)
            self._lock.release()

    # --- opening ---

    def _scan(self) -> None:
        if self._ledger is None:
            has_index = os.path.exists(self.paths.index) or os.path.exists(self.paths.journal)
            has_texts = any(self._texts.ids(clean=True))
            if not has_index and not has_texts:
                return  # a new folder: nothing is written before `claim`
            self._ledger = Ledger.write(self.paths.ledger, durable=self._durable)
            take_over(self._ledger, self.paths)
            self._stale = True
        ledger, is_clean = self._ledger, self._ledger.is_clean()
        if is_clean:
            self.done = DigestSet(identity for block in self._texts.ids(clean=True) for identity in block)
        if not is_clean or len(self.done) != ledger.n_done():
            self.done = DigestSet()  # not held beside those that the repair makes
            self.done = self._repair(ledger)
            self._stale = True
        if self._stale and is_earlier(self.paths):
            self._export()  # from here on earlier versions refuse the folder

    def _repair(self, ledger: Ledger) -> DigestSet:
        """Bring the ledger in line with the files, which are the truth; the texts that have a whole file."""
        self._remove_torn(ledger)
        recorded, done = DigestSet(ledger.done()), DigestSet()
        n_found = 0
        for block in self._texts.ids(clean=True):
            known = recorded.contains_many(block)
            done.add_many(list(compress(block, known)))
            unknown = [identity for identity, there in zip(block, known, strict=True) if not there]
            for at in range(0, len(unknown), _READ_BLOCK):
                adopted = self._adopted(unknown[at : at + _READ_BLOCK])
                ledger.append(adopted)
                done.add_many([row.id for row in adopted])
                n_found += len(adopted)
        ledger.append(Row(REMOVED, identity) for identity in ledger.done() if identity not in done)
        if n_found:
            _log.info("%s: %s had no row in the ledger; they have now", self.paths.root, plural(n_found, "saved text"))
        return done

    def _remove_torn(self, ledger: Ledger) -> None:
        """Remove files of runs that did not end by themselves, whose size is not what was written."""
        for identity, size in ledger.unchecked():
            found = self._texts.size(identity)
            if found is not None and isinstance(size, int) and found != size:
                place = self._texts.place(identity)
                _log.warning("%s: torn (%d bytes of %d); its text will be embedded again", place, found, size)
                self._texts.remove(identity)

    def _adopted(self, ids: Sequence[str]) -> list[Row]:
        """Rows for the files that are whole; those that are not are removed."""
        rows = []
        for identity in ids:
            try:
                stored = self._texts.read(identity)
            except CorruptRecordError as error:
                _log.warning("%s; its text will be embedded again", error)
                self._texts.remove(identity)
                continue
            if self.header is not None:
                check_origin(self._texts, stored, self.header)
            size = self._texts.size(identity)
            rows.append(Row(DONE, identity, None, stored.n_tokens, len(stored.chunks), size))
        return rows

    def _begin_folder(self, header: Header) -> None:
        """Record what the vectors are made with, before there is any."""
        if self._ledger is None:
            self._ledger = Ledger.write(self.paths.ledger, durable=self._durable)
        self._ledger.set_header(header)
        self.header = header
        self._export()

    def _drop_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = self._additions = None
        remove_ledger(self.paths.ledger)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What goes wrong in the block is a `StoreError`, and leaves the folder for the next run to put in order."""
        try:
            with storage_errors(self.paths.root):
                yield
        except LedgerDamaged as error:
            self._broken = True
            self._lose_ledger(error)
            raise StoreError(
                f"{self.paths.ledger}: was damaged while the job ran ({error}); run the same command again: it is made "
                "anew, and what is saved stays"
            ) from error
        except BaseException:
            self._broken = True
            raise

    def _lose_ledger(self, error: LedgerDamaged) -> None:
        _log.warning("%s: is damaged (%s); it is made anew from index and files", self.paths.ledger, error)
        self._drop_ledger()

    # --- saving ---

    def _commit(self, records: Sequence[EmbeddedText]) -> None:
        if self._wipe:
            self._held.extend(records)
            if self.header is None or all(record.error is not None for record in records):
                return
            self._begin_anew(self.header)
            records, self._held = self._held, []
        if self._ledger is None:
            raise AssertionError("records are committed to a folder without a ledger: this is a bug")
        if self._additions is None:
            self._additions = Additions(self._ledger)
        fresh, others = self._sorted(records)
        if fresh:
            self._ledger.begin()  # recorded before any file that it is to know
        sizes = self._texts.append(fresh, self._digest)
        self._ledger.append(self._additions.rows(zip(fresh, sizes, strict=True), others))
        errors = [_error_line(record) for record in records if record.error is not None]
        if errors:
            append_lines(self.paths.errors, errors)
        ids = [record.id for record in fresh]
        self._n_new += self.done.contains_many(ids).count(False)
        self._written.add_many(ids)

    def _begin_anew(self, header: Header) -> None:
        """Remove what earlier jobs wrote, and nothing else. The index goes last: it says what the vectors were."""
        self._texts.wipe()
        self._drop_ledger()
        remove(self.paths.journal)
        remove(self.paths.index)
        self._wipe = False
        self._begin_folder(header)
        if self._durable:
            flush_folder(self.paths.root)

    def _sorted(self, records: Sequence[EmbeddedText]) -> tuple[list[EmbeddedText], list[EmbeddedText]]:
        """Those to save, and those that failed or are saved already; without failures that a saved text makes good."""
        texts = [record.id for record in records if record.id]
        saved = set(compress(texts, self._written.contains_many(texts)))
        fresh, others = [], []
        for record in records:
            # 1. failed, and is no text or saved all the same   2. failed, or its file is there   3. new
            if record.error is not None and (not record.id or record.id in saved or record.id in self.done):
                continue
            if record.error is not None or record.cached or record.id in saved:
                others.append(record)
            else:
                saved.add(record.id)
                fresh.append(record)
        return fresh, others

    def _export(self) -> None:
        """Write the index; of a very large folder only its head."""
        if self._ledger is not None and self.header is not None:
            n_texts = len(self.done) + self._n_new
            export(self._ledger, self.header, self.paths.index, n_texts, with_texts=n_texts <= MOST_EXPORTED)
            remove(self.paths.journal)

    def _complete(self, ledger: Ledger) -> None:
        if self._stale or ledger.is_running or not is_whole(self.paths.index):
            self._export()  # first: killed in between, the next run finds the ledger unfinished, and does this again
            ledger.end(len(self.done) + self._n_new)
            if self._durable:
                flush_folder(self.paths.root)

    def _read(self, identity: str) -> StoredText | CorruptRecordError:
        path = self._texts.place(identity)
        try:
            with storage_errors(path):
                stored = self._texts.read(identity)
                if self._claimed and self.header is not None:
                    check_origin(self._texts, stored, self.header)
                return stored
        except StoreMismatchError as error:  # put there by hand: made anew, it fits
            return CorruptRecordError(str(error))
        except CorruptRecordError as error:
            return error
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _LOST:
                return CorruptRecordError(str(error))
            raise


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
