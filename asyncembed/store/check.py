"""Checks a folder and changes it without a run: damaged files removed, ledger and index made anew, under its lock."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.store.digests import DigestSet
from asyncembed.store.files import StorePaths, remove, storage_errors, temporary_of
from asyncembed.store.format import STRANGE, Format, StoredText
from asyncembed.store.formats import format_of
from asyncembed.store.index import ask, export, is_earlier, is_whole, reading
from asyncembed.store.ledger import DONE, FAILED, KEY, Header, Ledger, LedgerDamaged, Row, remove_ledger
from asyncembed.store.lock import FolderLock
from asyncembed.store.reader import read_header
from asyncembed.store.writer import FolderWriter

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
        n_unlisted: Of those, whole ones that the ledger does not know; the next run takes them in.
    """

    def __init__(self, paths: StorePaths) -> None:
        self.n_files = 0
        self.n_unlisted = 0
        self._paths = paths
        self._texts = format_of(paths)
        self._header: Header | None = None
        self._examples: dict[tuple[int, str | None], str] = {}
        self._alike: Counter[tuple[int, str | None]] = Counter()

    def __repr__(self) -> str:
        return f"<FolderCheck {self._paths.root!r} n_files={self.n_files}>"

    def faults(self) -> Iterator[Fault]:
        """All that is wrong, as it is found."""
        with storage_errors(self._paths.root), closing(reading(self._paths)) as ledger:
            self._header = read_header(self._paths)
            listed = DigestSet()
            try:
                for row in ledger.texts():
                    if row.kind == DONE:
                        listed.add_many([row.id])
                        yield from self._check(row.id, row)
            except LedgerDamaged as error:
                yield Fault(self._paths.ledger, f"is damaged ({error}); {_REBUILD}")
            for block in self._texts.ids():
                known = listed.contains_many(block)
                for name in (name for name, there in zip(block, known, strict=True) if not there):
                    self.n_unlisted += 1
                    yield from self._check(name, None)
            yield from self._about_ledger(ledger)

    def _about_ledger(self, ledger: Ledger) -> Iterator[Fault]:
        paths = self._paths
        if self._header is None and self.n_files:
            lost = "is gone or cannot be read, and with it what the texts were made with"
            yield Fault(paths.ledger, f"{lost}; the next run writes it, if it makes the same")
            ways = [f"{n:,} as {self._examples[way]} ({way[0]} numbers)" for way, n in self._alike.most_common()]
            if len(ways) > 1:
                told = "nothing says which are right: move away what does not belong here, and run a job"
                yield Fault(paths.data, f"its files were made in {len(ways)} ways, {', '.join(ways)}; {told}")
        elif ledger.is_temporary and self.n_files and not is_earlier(paths):
            yield Fault(paths.ledger, f"is gone or cannot be read; {_REBUILD}")
        elif os.path.exists(paths.index) and not is_whole(paths.index):
            yield Fault(paths.index, f"is torn; {_REBUILD}")

    def _check(self, identity: str, row: Row | None) -> Iterator[Fault]:
        path = self._texts.place(identity)
        try:
            stored = self._texts.read(identity)
        except FileNotFoundError:
            if row is not None:
                yield Fault(path, "is gone; the next run over its text makes it again")
            return
        except CorruptRecordError as error:
            self.n_files += 1
            yield Fault(path, error.reason, os.path.isfile(path))
            return
        self.n_files += 1
        fault = self._misfit(stored, row, path)
        if fault is not None:
            yield fault

    def _misfit(self, stored: StoredText, row: Row | None, path: str) -> Fault | None:
        """What is wrong with a file that can be read; None if nothing is.

        A file may go for what it differs in only where a header says what is right: of files that merely differ from
        each other, any may be the good ones.
        """
        dim = len(stored.embedding)
        told = self._header.fingerprint.get("dim") if self._header is not None else None
        # 1. nothing says what is right   2. another length   3. other options   4. not what the ledger says
        if told is None:
            way = (dim, stored.fingerprint)
            self._examples.setdefault(way, path)
            self._alike[way] += 1
        elif dim != told:
            return Fault(path, f"its vector has {dim} numbers, the folder's have {told}", True)
        if self._header is not None and not self._header.covers(stored):
            return Fault(path, STRANGE, True)
        if row is None:
            return None
        size = self._texts.size(stored.id)
        found = {"n_chunks": len(stored.chunks), "n_tokens": stored.n_tokens, "size": size}
        for name, number in found.items():
            told = getattr(row, name)
            if told not in (None, number):
                if row.size == size:
                    reason = f"says that {name} of {stored.id} is {told}, its file says {number}; {_REBUILD}"
                    return Fault(self._paths.ledger, reason)
                return Fault(path, f"its {name} is {number}, the ledger says {told}", self._header is not None)
        return None


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


def failures(paths: StorePaths) -> tuple[list[Failure], bool]:
    """The texts that failed, and that the next run tries again, ids ascending; and whether these are all there were."""
    with storage_errors(paths.root):
        found, is_temporary = ask(paths, _failed)
        is_lost = is_temporary and not (is_earlier(paths) and is_whole(paths.index))
        is_new = not any(map(os.path.exists, (paths.ledger, paths.index))) and not any(format_of(paths).ids())
        return found, is_new or not is_lost


def _failed(ledger: Ledger) -> tuple[list[Failure], bool]:
    found = {row.id: Failure(row.id, row.error or "", ()) for row in ledger.texts() if row.kind == FAILED}
    for key, identity in ledger.owners() if found else ():
        if identity in found:
            found[identity] = replace(found[identity], keys=(*found[identity].keys, key))
    return list(found.values()), ledger.is_temporary


def remove_damaged(paths: StorePaths, faults: Iterable[Fault]) -> Iterator[Fault]:
    """Remove each file, as its fault is found, that the next run had better make anew; ledger and index forget it."""
    with closing(FolderWriter(paths)) as writer:
        writer.open(scan=False)
        n_removed = 0
        for fault in faults:
            if fault.removable:
                with storage_errors(fault.path):
                    os.unlink(fault.path)
                n_removed += 1
            yield fault
        if n_removed:
            writer.scan()


def rebuild(paths: StorePaths) -> Iterator[Fault]:
    """Make ledger and index anew from the files; keys and failures are kept as far as they can be read.

    Files that are damaged or from elsewhere are left where they are, reported, and not listed.
    """
    lock = FolderLock(paths)
    temporary = temporary_of(paths.ledger)
    lock.acquire()
    try:
        with storage_errors(paths.root):
            remove_ledger(temporary)
            with closing(reading(paths, thorough=True)) as old, closing(Ledger.write(temporary)) as new:
                header = old.header()
                if header is None:
                    raise StoreError(
                        f"{paths.root}: ledger and index are gone or cannot be read, so nothing says what its texts "
                        "were made with; run a job with the options that made them: it checks that they fit, and "
                        "writes both"
                    )
                new.set_header(header)
                known = DigestSet()
                yield from _list_files(format_of(paths), header, new, known)
                n_done = len(known)
                failed = [row for row in old.texts() if row.kind == FAILED and row.id not in known]
                known.add_many([row.id for row in failed])
                new.append(failed)
                new.append(Row(KEY, identity, key) for key, identity in old.owners() if identity in known)
                export(new, header, paths.index, n_done)
                new.end(n_done)
                new.close(plain=True)
            remove_ledger(paths.ledger)
            os.replace(temporary, paths.ledger)
            remove(paths.journal)
    finally:
        remove_ledger(temporary)
        lock.release()


def _list_files(texts: Format, header: Header, ledger: Ledger, whole: DigestSet) -> Iterator[Fault]:
    """Append a row for every file that is whole and belongs here."""
    for block in texts.ids(clean=True):
        rows = []
        for identity in block:
            try:
                stored = texts.read(identity)
            except CorruptRecordError as error:
                yield Fault(texts.place(identity), error.reason, True)
                continue
            if not header.covers(stored):
                yield Fault(texts.place(identity), STRANGE, True)
                continue
            rows.append(Row(DONE, identity, None, stored.n_tokens, len(stored.chunks), texts.size(identity)))
        ledger.append(rows)
        whole.add_many([row.id for row in rows])
