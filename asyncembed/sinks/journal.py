"""The journal: one line for each thing that happened since the index was written."""

from __future__ import annotations

import contextlib
import mmap
import os
from array import array
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import numpy.typing as npt

from asyncembed.sinks.codec import decode_json
from asyncembed.sinks.entries import line_id
from asyncembed.sinks.flushing import flush, flush_folder
from asyncembed.sinks.folder import APPEND, remove, write_all
from asyncembed.sinks.header import VERSION, Header, header_from

_HEADER_BYTES = 1 << 20  # a first line longer than this is no header
_BLOCK = 8192


class Journal:
    """An append-only file of JSON lines, the first of which repeats the header.

    While it exists, the index is behind: a run is under way, or was killed. A clean end removes it.
    """

    def __init__(self, path: str, *, durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        self._descriptor: int | None = None
        self._size = 0

    def __repr__(self) -> str:
        return f"<Journal {self.path!r} {self._size} bytes{'' if self._descriptor is None else ' open'}>"

    @property
    def size(self) -> int:
        """Bytes of the file as far as this object has opened it."""
        return self._size

    def exists(self) -> bool:
        """Whether there is one on disk."""
        return os.path.exists(self.path)

    def start(self, header: Header | None) -> None:
        """Open it for appending and write the header if it is new. A torn last line is ended first.

        It is on disk before any file it speaks of, so a folder without one was left in order.
        """
        if self._descriptor is not None:
            return
        self._descriptor = os.open(self.path, APPEND, 0o666)
        self._size = os.fstat(self._descriptor).st_size
        if self._size:
            with open(self.path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            if torn:
                self.append(b"\n")
        else:
            self.append((b'{"version":%d}' % VERSION if header is None else header.encoded()) + b"\n")
            if self._durable:
                flush_folder(os.path.dirname(self.path))

    def append(self, lines: bytes) -> None:
        """Append whole lines in one write; what a full disk cut off is taken back.

        Raises:
            OSError: They could not be written.
        """
        if self._descriptor is None:
            raise AssertionError("the journal is written before it was started: this is a bug")
        try:
            write_all(self._descriptor, lines)
            if self._durable:
                flush(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(lines)

    def close(self) -> None:
        """Close the file and leave it there. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Remove it: the index says all it said. The next `start` begins anew."""
        self.close()
        remove(self.path)
        self._size = 0


def journal_header(path: str) -> Header | None:
    """The header on a journal's first line; None if there is no journal or the line is torn or empty.

    Raises:
        StoreError: A newer version of this library wrote it.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline(_HEADER_BYTES)
    except FileNotFoundError:
        return None
    try:
        return header_from(decode_json(line), path)
    except ValueError:
        return None


def journal_lines(path: str) -> Iterator[tuple[bytes, bytes]]:
    """Id and line of each line that has an id, in the order written; a line may still be torn at its end."""
    try:
        file = open(path, "rb")  # noqa: SIM115  # the generator closes it below
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if identity := line_id(line):
                yield identity, line


def journal_by_id(path: str) -> Iterator[tuple[bytes, list[bytes]]]:
    """Id and lines of each text in the journal, ids ascending, lines in the order written.

    Holds 16 bytes for each line; the lines themselves are read through the page cache.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115  # the generator closes it below
    except FileNotFoundError:
        return
    with file:
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            prefixes, offsets = _sorted_offsets(view)
            for _, group in groupby(_in_blocks(prefixes, offsets), lambda pair: pair[0]):
                yield from _lines_at(view, [offset for _, offset in group])


def _sorted_offsets(view: mmap.mmap) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """First 8 bytes of the digest and offset of each line with an id, sorted by both."""
    offsets, prefixes, ids = array("q"), bytearray(), []
    offset = 0
    while line := view.readline():
        if identity := line_id(line):
            offsets.append(offset)
            ids.append(identity[:16])
            if len(ids) == _BLOCK:
                prefixes += bytes.fromhex(b"".join(ids).decode())
                ids.clear()
        offset += len(line)
    prefixes += bytes.fromhex(b"".join(ids).decode())
    words = np.frombuffer(prefixes, ">u8").astype(np.uint64)
    order = np.argsort(words, kind="stable")  # stable: the lines of one text stay in the order written
    return words[order], np.frombuffer(offsets, np.int64)[order]


def _in_blocks(prefixes: npt.NDArray[np.uint64], offsets: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs as Python numbers, made a block at a time."""
    for at in range(0, len(offsets), _BLOCK):
        yield from zip(prefixes[at : at + _BLOCK].tolist(), offsets[at : at + _BLOCK].tolist(), strict=True)


def _lines_at(view: mmap.mmap, offsets: list[int]) -> Iterator[tuple[bytes, list[bytes]]]:
    """The lines at some offsets, grouped by their whole id."""
    groups: dict[bytes, list[bytes]] = {}
    for offset in offsets:
        view.seek(offset)
        line = view.readline()
        identity = line_id(line)
        if identity is None:
            raise AssertionError("the journal changed while it was read under the lock: this is a bug")
        groups.setdefault(identity, []).append(line)
    for identity in sorted(groups):
        yield identity, groups[identity]
