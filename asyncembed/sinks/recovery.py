"""What is done, found out when a folder is opened; and the repair of what a killed run left."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator

from asyncembed.errors import CorruptRecordError
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.entries import COMPLETED, completed_line, entry_line, fold, is_completed
from asyncembed.sinks.folder import StorePaths, record_ids, remove, replacing
from asyncembed.sinks.header import Header
from asyncembed.sinks.index import IndexState, foreign_entries, index_lines
from asyncembed.sinks.journal import Journal, journal_by_id
from asyncembed.sinks.origin import check_origin
from asyncembed.sinks.record_file import read_record
from asyncembed.wording import plural

_log = logging.getLogger("asyncembed")
_READ_BLOCK = 256  # files read before their journal lines are written


def listed_ids(paths: StorePaths) -> DigestSet:
    """The texts that have a file. Removes the temporary files that a killed run left."""
    done = DigestSet()
    for block in record_ids(paths, clean=True):
        done.add_many(block)
    return done


def repair(paths: StorePaths, state: IndexState, journal: Journal, header: Header | None) -> DigestSet:
    """Bring the journal in line with the files, which are the truth.

    Torn files are removed; whole ones that neither index nor journal knows are journalled.

    Returns:
        The texts that have a whole file.

    Raises:
        OSError: The folder cannot be read or written.
        StoreMismatchError: A file that was put into the folder was made with other weights or options.
    """
    recorded = DigestSet()
    if state.intact:
        recorded.update(identity.decode() for identity, body in index_lines(paths.index) if is_completed(body))
    recorded.update(_whole_in_journal(paths))
    done = DigestSet()
    n_found = 0
    for block in record_ids(paths, clean=True):
        known = recorded.contains_many(block)
        done.add_many([identity for identity, there in zip(block, known, strict=True) if there])
        unknown = [identity for identity, there in zip(block, known, strict=True) if not there]
        for at in range(0, len(unknown), _READ_BLOCK):
            adopted = _adopt(paths, unknown[at : at + _READ_BLOCK], journal, header)
            done.add_many(adopted)
            n_found += len(adopted)
    if n_found:
        _log.info("%s: saved but not yet in the index were %s; they are now", paths.root, plural(n_found, "text"))
    return done


def salvage_index(paths: StorePaths, header: Header | None) -> None:
    """Put what can be read of a torn or reformatted index into the journal, before the lines it has.

    Raises:
        OSError: The journal cannot be written.
    """
    _log.warning("%s: the index is torn or was reformatted; it is made anew from journal and files", paths.index)
    with replacing(paths.journal) as file:
        file.write((header.encoded() if header is not None else b'{"version":1}') + b"\n")
        for identity, entry in foreign_entries(paths.index):
            file.write(entry_line(identity, entry))
        for _, lines in journal_by_id(paths.journal):
            file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in lines)


def _whole_in_journal(paths: StorePaths) -> Iterator[str]:
    """The texts that the journal calls completed and whose file has the size it says; torn files are removed."""
    for identity, lines in journal_by_id(paths.journal):
        entry = fold(None, lines)
        if entry is None or entry["status"] != COMPLETED:
            continue
        path = paths.record(identity.decode())
        try:
            status = os.stat(path)
        except OSError:  # gone, or a link that leads nowhere
            continue
        if not stat.S_ISREG(status.st_mode):
            continue  # the writer puts the file in its place
        size = status.st_size
        if size and size == entry.get("size", size):
            yield identity.decode()
        else:
            _log.warning("%s: torn (%d bytes of %s); its text will be embedded again", path, size, entry.get("size"))
            remove(path)


def _adopt(paths: StorePaths, ids: list[str], journal: Journal, header: Header | None) -> list[str]:
    """Journal the files that are whole, remove those that are not, and return the ids of the former."""
    lines, adopted = [], []
    for identity in ids:
        path = paths.record(identity)
        try:
            record = read_record(identity, path)
        except CorruptRecordError as error:
            _log.warning("%s; its text will be embedded again", error)
            remove(path)
            continue
        if header is not None:
            check_origin(paths, record, header)
        lines.append(completed_line(identity, record.n_tokens, len(record.chunks), os.stat(path).st_size, None))
        adopted.append(identity)
    if lines:
        journal.start(header)
        journal.append(b"".join(lines))
    return adopted
