"""Looking over a whole folder: every file against its name, its neighbours and the index, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asyncembed.errors import CorruptRecordError
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import is_completed, parse
from asyncembed.sinks.folder import StorePaths, is_folder, record_ids, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import index_state, merged_entries
from asyncembed.sinks.journal import journal_header
from asyncembed.sinks.origin import STRANGE, Origins, is_of
from asyncembed.sinks.record_file import StoredText, read_record

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
