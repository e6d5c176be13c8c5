"""The index: one sorted line for each text, written by streaming and read by its first and last line.

```
{"version":1,"fingerprint":{…},"made_with":{…},"texts":{
"<id>":{"status":"completed",…},
"<id>":{…}
},"n_completed":2}
```
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import ijson

from asyncembed.sinks.codec import decode_json, encode_json
from asyncembed.sinks.entries import Entry, canonical, fold, is_completed, moved_keys, parse, without_moved
from asyncembed.sinks.folder import replacing
from asyncembed.sinks.header import VERSION, Header, header_from
from asyncembed.sinks.journal import journal_by_id, journal_lines

_HEADER_BYTES = 1 << 20
_LAST_LINE = re.compile(rb'\n\},"n_completed":(\d+)\}\n\Z')
_ID = re.compile("[0-9a-f]{64}")
_ENTRY_START = re.compile(rb'"([0-9a-f]{64})":\{')
_BLOCK = 4096
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class IndexState:
    """What the first and last line of an index say.

    Attributes:
        exists: There is a file.
        intact: It is as this library writes it, from the first line to the last.
        header: Its header; None if there is none.
        n_completed: Texts it calls completed.
        size: Bytes of the file.
    """

    exists: bool = False
    intact: bool = False
    header: Header | None = None
    n_completed: int = 0
    size: int = 0


def index_state(path: str) -> IndexState:
    """Look at the first and last line of an index; one that is torn or was reformatted is not `intact`.

    Raises:
        StoreError: A newer version of this library wrote it.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed by the with below
    except FileNotFoundError:
        return IndexState()
    with file:
        size = os.fstat(file.fileno()).st_size
        first = file.readline(_HEADER_BYTES)
        file.seek(max(0, len(first) - 1, size - 64))
        last = _LAST_LINE.search(file.read())
    try:
        header = header_from(decode_json(first + b"}}") if first.endswith(b'"texts":{\n') else None, path)
    except ValueError:
        header = None
    if header is None or last is None:
        return IndexState(True, False, header or _foreign_header(path), 0, size)
    return IndexState(True, True, header, int(last[1]), size)


def index_lines(path: str) -> Iterator[tuple[bytes, bytes]]:
    """Id and entry of each line of an intact index, ids ascending; damaged lines are passed over."""
    previous = b""
    with open(path, "rb", buffering=1 << 20) as file:
        file.readline()  # the header
        for line in file:
            match = _ENTRY_START.match(line)
            if match and match[1] > previous and (body := line[67:].rstrip(b",\r\n")).endswith(b"}"):
                previous = match[1]
                yield match[1], body


def foreign_entries(path: str) -> Iterator[tuple[str, Entry]]:
    """The entries of an index that was reformatted or torn, as far as it can be read, in its own order."""
    with open(path, "rb") as file:
        try:
            for identity, entry in ijson.kvitems(_shallow(file), "texts"):
                if _ID.fullmatch(identity) and isinstance(entry, dict) and (known := canonical(entry)):
                    yield identity, known
        except (ijson.JSONError, ValueError):
            return  # torn here; the per-text files say the rest


def is_readable(path: str) -> bool:
    """Whether an index that was reformatted can be read to its end."""
    try:
        with open(path, "rb") as file:
            return sum(prefix == "texts" and event == "start_map" for prefix, event, _ in _shallow(file)) == 1
    except (ijson.JSONError, ValueError):
        return False


def index_entries(path: str) -> Iterator[tuple[str, Entry]]:
    """Every entry of an index, however it is formatted; nothing if there is none."""
    state = index_state(path)
    if not state.exists:
        return
    if not state.intact:
        yield from foreign_entries(path)
        return
    for identity, body in index_lines(path):
        if (entry := parse(body)) and (known := canonical(entry)):
            yield identity.decode(), known


def write_index(
    path: str, header: Header, old: str | None, journal: str, still_there: Callable[[Sequence[str]], list[bool]]
) -> IndexState:
    """Replace the index by the merge of itself and the journal, in bounded memory.

    Returns:
        The state of the new index.

    Raises:
        OSError: It could not be written; the old one is as it was.
    """
    n_completed = 0
    separator = b"\n"
    with replacing(path) as file:
        file.write(header.encoded()[:-1] + b',"texts":{')
        for block in _blocks(merged_entries(old, journal)):
            completed = [identity.decode() for identity, body in block if is_completed(body)]
            present = dict(zip(completed, still_there(completed), strict=True))
            for identity, body in block:
                if present.get(identity.decode(), True):
                    file.write(separator + b'"' + identity + b'":' + body)
                    separator = b",\n"
            n_completed += sum(present.values())
        file.write(b'\n},"n_completed":%d}\n' % n_completed)
        size = file.tell()
    return IndexState(True, True, header, n_completed, size)


def merged_entries(old: str | None, journal: str) -> Iterator[tuple[bytes, bytes]]:
    """Id and entry of each text of an intact index, if there is one, and the journal, ids ascending.

    Holds the keys that changed hands, and 16 bytes for each line of the journal.
    """
    owners = moved_keys(journal_lines(journal))
    for identity, body in _merged(old, journal):
        yield identity, without_moved(identity, body, owners)


def _merged(old: str | None, journal: str) -> Iterator[tuple[bytes, bytes]]:
    changes = journal_by_id(journal)
    change = next(changes, None)
    for identity, body in index_lines(old) if old is not None else ():
        while change is not None and change[0] < identity:
            yield from _folded(change[0], None, change[1])
            change = next(changes, None)
        if change is not None and change[0] == identity:
            yield from _folded(identity, body, change[1])
            change = next(changes, None)
        else:
            yield identity, body
    while change is not None:
        yield from _folded(change[0], None, change[1])
        change = next(changes, None)


def _folded(identity: bytes, body: bytes | None, lines: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    entry = fold(body, lines)
    if entry is not None:
        yield identity, encode_json(entry)


def _blocks(entries: Iterator[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    block: list[tuple[bytes, bytes]] = []
    for entry in entries:
        block.append(entry)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def _shallow(file: IO[bytes]) -> Iterator[tuple[str, str, Any]]:
    """The events of a JSON file that is not nested deeply: ijson keeps the whole path of each, level by level.

    Raises:
        ValueError: It is nested deeper than anything that is written here.
    """
    return ijson.parse(_depth_checked(ijson.basic_parse(file, use_float=True)))  # type: ignore[no-any-return]


def _depth_checked(events: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    depth = 0
    for event, value in events:
        depth += event.startswith("start_") - event.startswith("end_")
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH}")
        yield event, value


def _foreign_header(path: str) -> Header | None:
    """The header of an index that was reformatted or torn, as far as it can be read."""
    fields: dict[str, Any] = {"version": VERSION}
    for name in ("version", "fingerprint", "made_with"):
        with open(path, "rb") as file, contextlib.suppress(ijson.JSONError, ValueError, StopIteration):
            fields[name] = next(iter(ijson.items(_shallow(file), name)))
    return header_from(fields, path)
