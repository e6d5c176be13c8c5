"""What index and journal say about one text, and how several lines about it become one entry.

An entry is `{"status": "completed"|"failed", "n_tokens", "n_chunks", "key"?, "error"?, "size"?}`, always in this order,
so that its status can be told from its first bytes. A line of the journal is an entry with `"id"` before it; one that
has only `"id"` and `"key"` adds a key, and with `"moved"` takes it from all other texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from asyncembed.sinks.codec import decode_json, encode_json

COMPLETED = "completed"
FAILED = "failed"
_FIELDS = ("status", "n_tokens", "n_chunks", "key", "error", "size")
_COMPLETED_START = b'{"status":"completed"'
_LINE_START = re.compile(rb'\{"id":"([0-9a-f]{64})",')

Entry = dict[str, Any]


def completed_line(identity: str, n_tokens: int, n_chunks: int, size: int, key: str | None) -> bytes:
    """The journal's line for a text whose file of `size` bytes is in place."""
    line: Entry = {"id": identity, "status": COMPLETED, "n_tokens": n_tokens, "n_chunks": n_chunks}
    if key is not None:
        line["key"] = key
    line["size"] = size
    return encode_json(line) + b"\n"


def failed_line(identity: str, n_tokens: int, n_chunks: int, error: str, key: str | None) -> bytes:
    """The journal's line for a text that could not be embedded."""
    line: Entry = {"id": identity, "status": FAILED, "n_tokens": n_tokens, "n_chunks": n_chunks}
    if key is not None:
        line["key"] = key
    line["error"] = error
    return encode_json(line) + b"\n"


def key_line(identity: str, key: str) -> bytes:
    """The journal's line for one more key of a text."""
    return encode_json({"id": identity, "key": key}) + b"\n"


def moved_line(identity: str, key: str) -> bytes:
    """The journal's line for a key that another text had, and this one has now."""
    return encode_json({"id": identity, "key": key, "moved": True}) + b"\n"


def is_moved(line: Mapping[str, Any]) -> bool:
    """Whether a line's key was another text's."""
    return line.get("moved") is True


def moved_keys(lines: Iterable[tuple[bytes, bytes]]) -> dict[str, bytes]:
    """The keys that changed hands, and who has each now, by a journal's ids and lines in the order written."""
    owners: dict[str, bytes] = {}
    for identity, data in lines:
        if b'"moved"' in data and (line := parse(data)) is not None and is_moved(line):
            owners.update(dict.fromkeys(keys_of(line), identity))
    return owners


def without_moved(identity: bytes, body: bytes, owners: Mapping[str, bytes]) -> bytes:
    """An entry's bytes less the keys that belong to another text now."""
    if not owners or b'"key"' not in body or (entry := parse(body)) is None:
        return body
    keys = [key for key in keys_of(entry) if owners.get(key, identity) == identity]
    if len(keys) == len(list(keys_of(entry))):
        return body
    entry.pop("key")
    if keys:
        entry["key"] = keys[0] if len(keys) == 1 else keys
    return encode_json(canonical(entry) or entry)


def entry_line(identity: str, entry: Mapping[str, Any]) -> bytes:
    """The journal's line for an entry that was read elsewhere."""
    return encode_json({"id": identity, **entry}) + b"\n"


def line_id(line: bytes) -> bytes | None:
    """The id of a journal line as 64 ASCII bytes; None if it is the header or was torn before its id ended."""
    match = _LINE_START.match(line)
    return match[1] if match else None


def is_completed(body: bytes) -> bool:
    """Whether an entry's bytes say that its text is embedded."""
    return body.startswith(_COMPLETED_START)


def parse(data: bytes) -> Entry | None:
    """A line or an entry's bytes as a dict; None if torn."""
    try:
        value = decode_json(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def canonical(entry: Mapping[str, Any]) -> Entry | None:
    """The known fields of an entry in their order; None if it has no known status."""
    if entry.get("status") not in (COMPLETED, FAILED):
        return None
    return {name: entry[name] for name in _FIELDS if name in entry}


def keys_of(entry: Mapping[str, Any]) -> Iterator[str]:
    """The keys of an entry or a line: none, one, or a list."""
    keys = entry.get("key")
    yield from [keys] if isinstance(keys, str) else [key for key in keys or () if isinstance(key, str)]


def fold(body: bytes | None, lines: Iterable[bytes]) -> Entry | None:
    """One entry out of the index's, if there is one, and the journal's lines for that text in their order.

    The last status wins and keys add up. Torn lines are passed over.

    Returns:
        The entry; None if nothing said what became of the text.
    """
    entry: Entry | None = None
    keys: dict[str, None] = {}
    for data in (*(() if body is None else (body,)), *lines):
        line = parse(data)
        if line is None:
            continue
        keys.update(dict.fromkeys(keys_of(line)))
        entry = canonical(line) or entry
    if entry is None:
        return None
    entry.pop("key", None)
    if keys:
        entry["key"] = next(iter(keys)) if len(keys) == 1 else list(keys)
    return canonical(entry)
