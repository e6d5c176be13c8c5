"""Physical lines of a binary file: bounded, counted, and decoded without losing the place of a bad byte."""

from __future__ import annotations

import re
import zlib
from io import BufferedReader

from asyncembed.errors import SourceError

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
        """The rest of the line under way or the next line, its end included, but at most `max_bytes`; b"" at the end.

        Raises:
            SourceError: The file cannot be read further.
        """
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
