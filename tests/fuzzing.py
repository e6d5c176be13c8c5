"""Damaged inputs for readers and store, and what must hold for each: texts, or one clean error; nothing unseen lost."""

from __future__ import annotations

import io
import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncembed.errors import AsyncEmbedError, CorruptRecordError
from asyncembed.records import Rejected, Text, text_id
from asyncembed.sources import read_texts
from asyncembed.store.files import StorePaths
from asyncembed.store.reader import open_embeddings
from asyncembed.store.writer import FolderWriter
from tests.store.making import FINGERPRINT, MADE_WITH, failure, record

WHOLE, CLEAN = "read whole", "clean error"

SEEDS: dict[str, list[bytes]] = {
    "txt": [
        "a heron\nzwei Boote\r\n\n数学 😀\nlast without an end".encode(),
        b"\xef\xbb\xbfa marked file\r\nof two lines\r\n",
        b"one \x00 two\nthree\rfour\n" * 3,
    ],
    "csv": [
        b'text,id\n"a ""quoted"" cell",1\n"over\ntwo lines",2\nplain,3\n,\n',
        'eins,zwei\r\n"drei, und",vier\r\n"",数学\r\n'.encode(),
        b'"only"\n"one\r\ncolumn"\n\n"x"\n',
    ],
    "json": [
        json.dumps(["a", 'b \\ " \n', "", "数 😀 \ud800", None, 3.5, [1, ["x"]], {"k": "v"}, "last"]).encode(),
        json.dumps({"k1": "one", "k2": "zwei ü", "deep": {"a": [{}]}, "k3": ""}, ensure_ascii=False, indent=1).encode(),
        b'[\n"one",\n"\\u00fcml\\ud83d\\ude00",\n"two"\n]\n',
    ],
}

_SPLICES = [
    b'"', b'""', b"'", b"\\", b"\\u", b"\\ud800", b"\\ud83d\\ude00", b"\\u0000", b",", b";", b"\n", b"\r", b"\r\n",
    b"\n\r", b"\0", b"\x1a", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\xfe\xff", b"[", b"]", b"{", b"}", b":", b"[" * 300, b'{"a":' * 150, b"]" * 120, b"9" * 400, b"1e999", b"-",
    b"NaN", b"Infinity", b"-0.0e-9", b"9" * 5000, b"null", "\u2028\u0085\u00a0".encode(), "\U000e0041".encode(),
    b" " * 80, b"x" * 3000, b"/*", b"#",
]  # fmt: skip


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """The seed with one to six kinds of damage."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.choice((1, 1, 2, 5)))
        elif kind == 2:
            del data[at : at + rng.choice((1, 1, 2, 10, 40))]
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            end = at + rng.choice((1, 5, 30))
            data[at:at] = data[at:end] * rng.choice((1, 2, 20))
        elif kind == 5:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + 30]
        elif kind == 6:
            data = bytearray(bytes(data).replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b""))))
        else:
            data[at:at] = rng.choice(_SPLICES)
    return bytes(data)


# --- readers ---


def check_reader(form: str, raw: bytes, *, as_pipe: bool = False, **options: Any) -> str:
    """Read an input and hold it against the reference; says whether it was read whole.

    Raises:
        AssertionError: A readable text is missing or changed.
        Exception: Any but an `AsyncEmbedError` is a fault of the reader.
    """
    file: Any = io.BytesIO(raw)
    if as_pipe:
        file = io.BufferedReader(file)  # of unknown size, like standard input
    found: list[Text] = []
    n_bad = 0
    try:
        for item in read_texts(file, input_format=form, on_bad_row="skip", **options):
            if isinstance(item, Rejected):
                n_bad += 1
                (item.content or "").encode()  # fit for a UTF-8 file
            else:
                found.append(item)
    except AsyncEmbedError as error:
        _check_message(error)
        _compare(form, raw, [item.text for item in found], refusal=str(error))
        return CLEAN
    _compare(form, raw, [item.text for item in found])
    return WHOLE


_REFUSALS = {
    "carriage returns alone": lambda raw: b"\r" in raw and b"\n" not in raw,
    "this is UTF-": lambda raw: raw.count(0) > 1 or raw.startswith((b"\xff\xfe", b"\xfe\xff")),
    "nothing but numbers": lambda raw: any(map(str.isdigit, raw.decode("utf-8", "replace"))),
    "--delimiter ';'": lambda raw: raw.count(b";") > 1,
}
"""Words with which a file is refused that is of its format to the letter, and what must be true of its bytes then."""


def _compare(form: str, raw: bytes, found: list[str], *, refusal: str | None = None) -> None:
    ended = refusal is None
    expected = REFERENCES[form](raw)
    if form == "json" and ended:
        assert expected is not None or not _is_broken_json(raw), f"{raw!r} is not JSON, and was read whole"
    if expected is None:  # not of the format: what came before the fault may be given, and nothing can be demanded
        return
    if ended:
        assert found == expected, f"{form}: {raw!r} gave {found!r}, not {expected!r}"
    else:
        is_meant = any(words in refusal and holds(raw) for words, holds in _REFUSALS.items())
        assert not expected or is_meant, f"{form}: {raw!r} is an error, not {expected!r}"


def _check_message(error: AsyncEmbedError) -> None:
    assert str(error)
    assert "\n" not in str(error)


def _readable(texts: Sequence[str | None]) -> list[str]:
    return [text for text in texts if text is not None and text.strip()]


def reference_txt(raw: bytes) -> list[str]:
    """Lines, one after the other; a line that is not UTF-8 is none."""
    found = []
    *lines, last = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for line in (*(line.removesuffix(b"\r") for line in lines), last):
        try:
            found.append(line.decode())
        except UnicodeDecodeError:
            continue
    return _readable(found)


def reference_csv(raw: bytes) -> list[str] | None:
    """The first cells of rows as wide as the first, letter by letter; None if it is not strictly CSV in UTF-8."""
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return None
    firsts: list[str] = []
    at, n_cells, width = 0, 0, 0
    first = ""
    while at < len(text):
        if text[at] == '"':
            cell, at = "", at + 1
            while True:
                end = text.find('"', at)
                if end < 0:
                    return None
                cell, at = cell + text[at:end], end + 1
                if text[at : at + 1] != '"':
                    break
                cell, at = cell + '"', at + 1
        else:
            stop = min((end for end in (text.find(mark, at) for mark in ",\n") if end >= 0), default=len(text))
            cell, at = text[at:stop], stop
            if cell.startswith(" ") and cell.lstrip(" ").startswith('"'):
                return None  # a quote after a blank
            if text[at : at + 1] != ",":
                at -= len(cell) - len(cell.rstrip("\r"))
                cell = cell.rstrip("\r")
        n_cells += 1
        first = cell if n_cells == 1 else first
        if text[at : at + 1] == ",":
            at += 1
            if at < len(text):
                continue
            n_cells += 1  # an empty cell ends the file
        rest = text[at:].lstrip("\r")
        if rest and rest[0] != "\n":
            return None  # letters behind a quote
        is_empty_line = n_cells == 1 and not first and text[at - 1 : at] != '"'
        width = width or (0 if is_empty_line else n_cells)
        if n_cells <= width:  # a wider row is a bad one
            firsts.append(first)
        at, n_cells = len(text) - len(rest) + 1, 0
    return _readable(firsts)


def reference_json(raw: bytes) -> list[str] | None:
    """What the json module reads; None if it is not JSON, or nested deeper than is taken."""

    def pairs(items: list[tuple[str, Any]]) -> Any:
        return {"": [value for _, value in items], "is an object": True}  # a key that comes twice gives two texts

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return None
    values = value if isinstance(value, list) else value[""] if isinstance(value, dict) else None
    if values is None or any(text.count(opening) > 90 for opening in "[{"):
        return None
    return _readable([one for one in values if isinstance(one, str)])


def _is_broken_json(raw: bytes) -> bool:
    try:
        json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError:
        return False  # a row with a bad byte is skipped, and what is around it may be sound
    except (ValueError, RecursionError):
        return True
    return False


REFERENCES: dict[str, Callable[[bytes], list[str] | None]] = {
    "txt": reference_txt,
    "csv": reference_csv,
    "json": reference_json,
}


# --- the store ---

TEXTS = ("one", "two \ud800 halves", "three ü", "four")
_DAMAGED = ("embeddings_index.json", "ledger.sqlite", "errors.jsonl", ".lock.owner", "record")


def folder_seed(root: Path, *, killed: bool) -> dict[str, bytes]:
    """The files of a small folder, as a clean end or a killed run leaves it: name → bytes."""
    writer = FolderWriter(StorePaths.of(root))
    writer.open()
    writer.claim(FINGERPRINT, MADE_WITH)
    writer.commit([record(TEXTS[0], "key"), record(TEXTS[1]), failure("bad", key="k"), record(TEXTS[2], "k2")])
    writer.commit([record(TEXTS[3], "key"), record(TEXTS[0], "another", cached=True)])
    writer.close(not killed)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {**files, ".lock.owner": b'{"pid":1,"host":"somewhere","started":"2026-01-01T00:00:00+00:00"}'}


def damaged(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """The files with damage in one of them, seldom in two."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(_DAMAGED)
        if name == "record":
            name = f"embeddings_data/{text_id(rng.choice(TEXTS))}.json"
        files[name] = mutated(files.get(name, b"{}\n"), rng)
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> None:
    """Make the folder hold these files and no others."""
    (root / "embeddings_data").mkdir(parents=True, exist_ok=True)
    for path in (*root.iterdir(), *(root / "embeddings_data").iterdir()):
        if path.is_file():
            os.unlink(path)
    for name, data in files.items():
        (root / name).write_bytes(data)


def check_store(root: Path) -> str:
    """Read a damaged folder, then go on with it; says whether it could be gone on with.

    Raises:
        AssertionError: A text was lost or is wrong.
        Exception: Any but an `AsyncEmbedError` is a fault of the store.
    """
    said = logging.getLogger("asyncembed")
    level = said.level
    said.setLevel(logging.ERROR)
    try:
        return _check_store(root)
    finally:
        said.setLevel(level)


def _check_store(root: Path) -> str:
    outcome = _look_at(root)
    writer = FolderWriter(StorePaths.of(root))
    try:
        writer.open()
        writer.claim(FINGERPRINT, MADE_WITH)
        _check_done(root, writer)
        writer.commit([record(text) for text in TEXTS])
        known = [text for text, there in zip(TEXTS, writer.done.contains_many(list(map(text_id, TEXTS))), strict=True)
                 if there]  # fmt: skip
        writer.read_many([text_id(text) for text in known])
    except AsyncEmbedError as error:
        _check_message(error)
        return CLEAN
    finally:
        writer.close()
    stored = open_embeddings(root)
    assert {one.text for one in stored} >= set(TEXTS)
    return outcome


def _check_done(root: Path, writer: FolderWriter) -> None:
    there = {path.stem for path in (root / "embeddings_data").glob("*.json") if len(path.stem) == 64}
    assert there == {identity for identity in there if identity in writer.done}, "a text that is there is not known"
    assert len(writer.done) == len(there), "a text that is not there is called done"


def _look_at(root: Path) -> str:
    try:
        stored = open_embeddings(root)
        stored.keys()
        stored.failures()
        for identity in stored.ids():
            stored.by_id(identity)
    except CorruptRecordError:
        return CLEAN
    except AsyncEmbedError as error:
        _check_message(error)
        return CLEAN
    return WHOLE
