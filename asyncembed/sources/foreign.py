"""What is no text file in UTF-8, known by its name or its first bytes, and what to do with it."""

from __future__ import annotations

import re
from typing import NamedTuple


class _Kind(NamedTuple):
    """A kind of file.

    Attributes:
        what: What it is.
        cure: How its texts can be had.
        extensions: Its usual names.
        magic: What its first bytes match.
    """

    what: str
    cure: str
    extensions: str = ""
    magic: bytes | None = None


_SHEET = "save the sheet as CSV in UTF-8, and name the column of the texts with --column"
_PLAIN = "save it as plain text in UTF-8, one text a line"
_TABLE = "read it with pandas and pass the column of the texts to embed_stream, or write that to a .csv"
_OBJECTS = "load it in Python and pass the texts to embed_stream"
_ROWS = "pass the rows of a query to embed_stream"
_ARCHIVE = "unpack it, and name a file of it"
_UNPACKED = "unpack it into a pipe, with {} FILE | asyncembed - --input-format txt, csv or json"
JSON_LINES = "one list of texts is made of it by: jq -s 'map(.text)' FILE > texts.json"

_KINDS = (
    _Kind("a spreadsheet", _SHEET, ".xlsx .xlsm .xls .xlsb .ods .numbers"),
    _Kind("a document", _PLAIN, ".docx .doc .odt .rtf .pptx .ppt .epub .pages", rb"\{\\rtf1"),
    _Kind("a PDF", "take its text out first, for example with pdftotext, one text a line", ".pdf", rb"%PDF-\d"),
    _Kind("an Office document", f"{_PLAIN}, or a sheet as CSV in UTF-8", magic=rb"\xd0\xcf\x11\xe0\xa1\xb1"),
    _Kind("compressed with gzip", _UNPACKED.format("gzip -dc"), ".gz .tgz", rb"\x1f\x8b"),
    _Kind("compressed with bzip2", _UNPACKED.format("bzip2 -dc"), ".bz2", rb"BZh\d1AY&SY"),
    _Kind("compressed with xz", _UNPACKED.format("xz -dc"), ".xz", rb"\xfd7zXZ\0"),
    _Kind("compressed with Zstandard", _UNPACKED.format("zstd -dc"), ".zst", rb"\x28\xb5\x2f\xfd"),
    _Kind("an archive", _ARCHIVE, ".7z .tar .rar", rb"7z\xbc\xaf\x27\x1c|Rar!\x1a"),
    _Kind("a zip archive (as .xlsx and .docx are)", f"{_ARCHIVE}; or {_SHEET}", ".zip", rb"PK\x03\x04"),
    _Kind("a Parquet table", _TABLE, ".parquet .pq", rb"PAR1\x15"),
    _Kind("a table of columns", _TABLE, ".feather .arrow .orc .avro", rb"ARROW1\0|Obj\x01|ORC\n"),
    _Kind("a database", _ROWS, ".sqlite .sqlite3 .db .duckdb", rb"SQLite format 3\0"),
    _Kind("a file of Python objects", _OBJECTS, ".pkl .pickle .npy .npz .pt", rb"\x80[\x02-\x05]\x95|\x93NUMPY"),
    _Kind(
        "a pointer of Git LFS, not the file itself", "git lfs pull fetches that", magic=rb"version https://git-lfs\."
    ),
    _Kind("JSON lines", JSON_LINES, ".jsonl .ndjson"),
    _Kind("a table with tabs", "--input-format csv --delimiter tab reads it", ".tsv .tab"),
)


def advice_by_name(extension: str) -> str | None:
    """What a file with such a name is, and what to do with it; None if that is not known."""
    return next((_say(kind) for kind in _KINDS if extension in kind.extensions.split()), None)


def advice_by_bytes(beginning: bytes) -> str | None:
    """What a file that begins so is, and what to do with it; None if nothing speaks against text in UTF-8."""
    # 1. Another kind of file.
    for kind in _KINDS:
        if kind.magic is not None and re.match(kind.magic, beginning):
            return _say(kind)
    # 2. Text in another encoding.
    encoding = _wide_encoding(beginning)
    if encoding is not None:
        return f"this is {encoding.upper()}, not UTF-8; --encoding {encoding} reads it"
    return None


def _say(kind: _Kind) -> str:
    return f"this is {kind.what}; {kind.cure}"


def _wide_encoding(beginning: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark, or by the zeros that it makes of every letter of the Latin alphabet."""
    if beginning.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if beginning.count(0) < 2:
        return None
    zeros = [beginning[at::4].count(0) / (len(beginning) / 4) for at in range(4)]
    if min(zeros[2:]) > 0.9 and zeros[0] < 0.5:
        return "utf-32-le"
    if min(zeros[:2]) > 0.9 and zeros[3] < 0.5:
        return "utf-32-be"
    # Letters of other alphabets have no zeros, but the line ends and blanks between them have. A few prove nothing.
    first, second = (zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2
    if max(first, second) > (0.1 if len(beginning) > 64 else 0.7) and min(first, second) * 4 < max(first, second):
        return "utf-16-le" if second > first else "utf-16-be"
    return None
