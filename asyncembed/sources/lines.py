"""Physical lines of a binary file: bounded, counted, decoded; and what says that a file is of another kind."""

from __future__ import annotations

import re
import zlib
from io import BufferedReader
from typing import NamedTuple

from asyncembed.errors import SourceError


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


MAX_TEXT_BYTES = 256 * 2**20
"""Largest text a file may hold; what is longer is a mistake such as an unclosed quote, or no text file at all."""

READ_ERRORS = (OSError, ValueError, EOFError, zlib.error)
"""What reading raises. ValueError: closed by someone else, or bytes of no encoding; the last two: a torn `.gz`."""

MAX_CONTENT_CHARS = 10_000
"""Characters of a bad row that are kept for `errors.jsonl`."""

ONLY_RETURNS = "the lines end in carriage returns alone; tr '\\r' '\\n' < FILE > NEW makes line ends of them"
PIECE_BYTES = 64 * 1024
BOM = b"\xef\xbb\xbf"
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # a lone surrogate that JSON's escapes gave, and that is no byte


class LineReader:
    """Reads a file line by line, never more than `max_bytes` of one line at a time.

    Attributes:
        name: The file's name in messages.
        number: Number of the line last read from, counted from 1; 0 before the first.
        bytes_read: Bytes taken from the file so far.
        max_bytes: Largest text, from `MAX_TEXT_BYTES`.
        at_start_of_line: What was read last had a line end.
    """

    def __init__(self, file: BufferedReader, name: str, encoding: str = "UTF-8") -> None:
        self.name = name
        self.number = 0
        self.bytes_read = 0
        self.max_bytes = MAX_TEXT_BYTES
        self.at_start_of_line = True
        self._file = file
        self._encoding = encoding

    def __repr__(self) -> str:
        return f"<LineReader {self.name!r} line={self.number} bytes_read={self.bytes_read}>"

    def error(self, reason: str, line: int | None = None) -> SourceError:
        """A `SourceError` that begins with the place, by default the line last read."""
        return SourceError(f"{self.name}:{self.number if line is None else line}: {reason}")

    def beginning(self) -> bytes:
        """What can be seen of the first 64 KiB, which are not taken; of a pipe, what has arrived."""
        try:
            return self._file.peek(PIECE_BYTES)[:PIECE_BYTES]
        except READ_ERRORS:
            return b""  # reading it says what is wrong

    def piece(self, max_bytes: int = PIECE_BYTES) -> bytes:
        """The rest of the line under way or the next line, its end included, at most `max_bytes`; b"" at the end."""
        try:
            piece = self._file.readline(max_bytes)
        except READ_ERRORS as error:
            raise self.error(f"cannot be read further: {getattr(error, 'strerror', None) or error}") from error
        first = self.bytes_read == 0
        self.bytes_read += len(piece)
        if self.at_start_of_line and piece:
            self.number += 1
        self.at_start_of_line = piece.endswith(b"\n")
        # A file that is nothing but a byte order mark is seen as empty; a marked piece is never empty otherwise.
        return (piece.removeprefix(BOM) or self.piece()) if first and piece else piece

    def line(self) -> tuple[bytes, bool]:
        """The next line without its end, and whether it is whole.

        A line longer than `max_bytes` is not: its beginning is returned and its rest skipped. At the end of the
        file the line is empty and `number` does not move.
        """
        content = piece = self.piece(self.max_bytes + 2)  # room for "\r\n"
        if content.endswith(b"\n"):
            content = content[: -2 if content.endswith(b"\r\n") else -1]
        if len(content) <= self.max_bytes:
            return content, True
        while piece and not piece.endswith(b"\n"):
            piece = self.piece()
        return content, False

    def decode(self, raw: bytes) -> tuple[str, str | None]:
        """Bytes as text, and what is wrong with them (None if nothing is).

        Bytes that are not UTF-8 become U+DC80 to U+DCFF, which valid UTF-8 never gives.
        """
        try:
            return raw.decode("utf-8"), None
        except UnicodeDecodeError as error:
            return raw.decode("utf-8", "surrogateescape"), self.bad_byte_reason(raw[error.start])

    def bad_byte_reason(self, byte: int) -> str:
        """The reason to refuse a row with a byte that is not of the file's encoding."""
        # Of a file that was converted to UTF-8 on the way, the byte itself is not known any more.
        which = f"the byte 0x{byte:02x}" if self._encoding == "UTF-8" else "a byte"
        return f"{which} is not {self._encoding}; was the file saved in another encoding? --encoding names it"

    def too_long(self) -> str:
        """The reason to refuse a text above the limit."""
        return f"more than {self.max_bytes:,} bytes in one text; split it, or look for a missing line end or quote"


def find_bad_byte(decoded: str) -> int | None:
    """The first byte that `surrogateescape` let through; None if all was UTF-8."""
    match = _BAD_BYTE.search(decoded)
    return None if match is None else ord(match[0]) - 0xDC00


def excerpt(content: str) -> str:
    """The beginning of a bad row, fit to be written as UTF-8."""
    beginning = _NO_BYTE.sub("\ufffd", content[:MAX_CONTENT_CHARS])
    return beginning.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
