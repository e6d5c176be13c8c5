"""`embeddings_index.json`: written as an export of the ledger, read where there is none, as earlier versions left it.

```
{"version":2,"fingerprint":{…},"made_with":{…},"texts":{
"<id>":{"status":"completed",…},
"<id>":{…}
},"n_completed":2}
```

Version 1 had no ledger: there the index was the record of finished runs, with a journal of lines beside it while one
was under way.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, TypeVar

from asyncembed.errors import StoreError
from asyncembed.store.files import StorePaths, decode_json, encode_json, replacing
from asyncembed.store.ledger import DONE, FAILED, KEY, REMOVED, Header, Ledger, LedgerDamaged, Row

T = TypeVar("T")
logger = logging.getLogger("asyncembed")

VERSION = 2
MOST_EXPORTED = 1_000_000
"""Texts above which only a rebuild, which is asked for, exports them one by one."""

_HEADER_BYTES = 1 << 20
_LAST_LINE = re.compile(rb'\},"n_completed":\d+\}\n\Z')
_INDEX_LINE = re.compile(rb'"([0-9a-f]{64})":(\{.*\}),?\s*')
_JOURNAL_LINE = re.compile(rb'(\{"id":"([0-9a-f]{64})",.*\})\s*')
_STATUS = {DONE: "completed", FAILED: "failed"}
_KIND = {status: kind for kind, status in _STATUS.items()}


def export(ledger: Ledger, header: Header, path: str, n_done: int, *, with_texts: bool = True) -> None:
    """Write what the ledger says, ids ascending, in bounded memory; `n_done` of its texts are saved."""
    fields = {"version": VERSION, "fingerprint": header.fingerprint, "made_with": header.made_with}
    with replacing(path) as file:
        file.write(encode_json(fields)[:-1] + b',"texts":{')
        separator = b"\n"
        for row, keys in _with_keys(ledger) if with_texts else ():
            file.write(separator + b'"' + row.id.encode() + b'":' + encode_json(_entry(row, keys)))
            separator = b",\n"
        file.write(b'\n},"n_completed":%d}\n' % n_done)


def _with_keys(ledger: Ledger) -> Iterator[tuple[Row, list[str]]]:
    """What became of each text, and its keys."""
    keys = ledger.owners()
    pair = next(keys, None)
    for row in ledger.texts():
        own = []
        while pair is not None and pair[1] <= row.id:
            if pair[1] == row.id:
                own.append(pair[0])
            pair = next(keys, None)
        if row.kind != REMOVED:
            yield row, own


def _entry(row: Row, keys: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"status": _STATUS[row.kind], "n_tokens": row.n_tokens, "n_chunks": row.n_chunks}
    if keys:
        entry["key"] = keys[0] if len(keys) == 1 else keys
    if row.kind == FAILED:
        entry["error"] = row.error
    else:
        entry["size"] = row.size
    return entry


def header_of(paths: StorePaths) -> Header | None:
    """The header that the index repeats, or a journal of version 1; None if neither has one."""
    for path, end in ((paths.index, b"}}"), (paths.journal, b"")):
        try:
            with open(path, "rb") as file:
                fields = decode_json(file.readline(_HEADER_BYTES) + end)
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(fields, dict) and isinstance(fields.get("version"), int):
            if fields["version"] > VERSION:
                raise StoreError(
                    f"{path}: written in version {fields['version']} of the format, this is version {VERSION}; "
                    "update asyncembed, or choose another save path"
                )
            fingerprint, made_with = fields.get("fingerprint"), fields.get("made_with", {})
            if isinstance(fingerprint, dict) and isinstance(made_with, dict):
                return Header(fingerprint, made_with)
    return None


def is_whole(path: str) -> bool:
    """Whether there is an index that ends as it should."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
            return _LAST_LINE.search(file.read()) is not None
    except FileNotFoundError:
        return False


def is_earlier(paths: StorePaths) -> bool:
    """Whether version 1 wrote the index, or a journal of it is there."""
    if os.path.exists(paths.journal):
        return True
    try:
        with open(paths.index, "rb") as file:
            return file.read(12) == b'{"version":1'
    except FileNotFoundError:
        return False


def take_over(ledger: Ledger, paths: StorePaths) -> None:
    """Append to a new ledger what index and journal say, as far as they can be read."""
    header = header_of(paths)
    if header is not None:
        ledger.set_header(header)
    n_done = 0

    def counted(rows: Iterable[Row]) -> Iterator[Row]:
        nonlocal n_done
        for row in rows:
            n_done += row.kind == DONE
            yield row

    ledger.append(counted(_rows(paths.index, _INDEX_LINE)))
    ledger.end(n_done)
    if os.path.exists(paths.journal):
        ledger.begin()  # and not ended: the sizes of its files are to be looked at
        ledger.append(_rows(paths.journal, _JOURNAL_LINE))


def reading(paths: StorePaths, *, thorough: bool = False) -> Ledger:
    """The ledger as it is, or what index and journal say where there is none that can be read."""
    ledger = Ledger.read(paths.ledger, thorough=thorough)
    return ledger if ledger is not None else _imported(paths)


def ask(paths: StorePaths, question: Callable[[Ledger], T]) -> T:
    """The answer of the ledger; of index and journal, where it turns out to be damaged."""
    try:
        with closing(reading(paths)) as ledger:
            return question(ledger)
    except LedgerDamaged as error:
        logger.warning("%s: is damaged (%s); keys and failures may be missing", paths.ledger, error)
        with closing(_imported(paths)) as ledger:
            return question(ledger)


def _imported(paths: StorePaths) -> Ledger:
    ledger = Ledger.temporary()
    take_over(ledger, paths)
    return ledger


def _rows(path: str, shape: re.Pattern[bytes]) -> Iterator[Row]:
    """What the lines of an index or a journal say; damaged ones are passed over."""
    try:
        file = open(path, "rb", buffering=1 << 20)  # noqa: SIM115  # closed by the with below
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if match := shape.fullmatch(line):
                body, identity = (match[2], match[1]) if shape is _INDEX_LINE else (match[1], match[2])
                with_fields = _parsed(body)
                yield from _rows_of(identity.decode(), with_fields)


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        fields = decode_json(body)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _rows_of(identity: str, fields: Mapping[str, Any]) -> Iterator[Row]:
    found = fields.get("key")
    keys = [key for key in (found if isinstance(found, list) else [found]) if isinstance(key, str)]
    kind = _KIND.get(str(fields.get("status")))
    if kind is not None:
        n_tokens, n_chunks, size = (_number(fields.get(name)) for name in ("n_tokens", "n_chunks", "size"))
        error = str(fields.get("error", "")) if kind == FAILED else None
        yield Row(kind, identity, keys.pop(0) if keys else None, n_tokens, n_chunks, size, error)
    for key in keys:
        yield Row(KEY, identity, key)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and abs(value) < 1 << 62 else None
