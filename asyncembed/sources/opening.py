"""Opening a path, standard input, or what is open already, and refusing at once what cannot be read."""

from __future__ import annotations

import codecs
import io
import os
import re
import stat
import sys
from collections.abc import Callable
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple

from asyncembed.errors import OptionsError, SourceError
from asyncembed.sources.lines import BOM, PIECE_BYTES
from asyncembed.wording import kind_of

STANDARD_INPUT = "-"
"""The source that stands for standard input."""

_ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not of the encoding


class Opened(NamedTuple):
    """A source that has been opened.

    Attributes:
        file: What was opened; closed at the end if `owned`.
        reader: Reads it as UTF-8.
        name: Its name in messages.
        owned: It was opened here.
        size: Bytes from its position to its end; None if unknown (a pipe).
    """

    file: BinaryIO
    reader: BufferedReader
    name: str
    owned: bool
    size: int | None

    @property
    def bytes_converted(self) -> int | None:
        """Bytes taken from a file that is converted to UTF-8; None of any other."""
        raw = self.reader.raw
        return raw.bytes_read if isinstance(raw, _Converted) and raw.encoding else None


class _Converted(io.RawIOBase):
    """A file as UTF-8, or, without an encoding, as it is.

    A byte that is not of the encoding becomes one that is not UTF-8, so that whoever decodes its row sees it.
    """

    def __init__(self, file: BinaryIO, encoding: str | None) -> None:
        self.encoding = encoding
        self.bytes_read = 0
        self._read: Callable[[int], bytes] = getattr(file, "read1", getattr(file, "read", file.readline))
        self._waiting = b""
        if encoding is not None:
            # Half a pair of UTF-16 or UTF-32 is a surrogate, which is no UTF-8 either.
            is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
            self._errors = "surrogatepass" if is_wide else "surrogateescape"
            self._decoder = codecs.getincrementaldecoder(encoding)(self._errors)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what the next read gives; 0 at the end."""
        at_end = False
        while not (self._waiting or at_end):  # the first bytes of a character give no text yet
            raw = self._read(PIECE_BYTES)
            at_end = not raw
            self.bytes_read += len(raw)
            self._waiting = raw if self.encoding is None else self._recoded(raw)
        n_bytes = min(len(buffer), len(self._waiting))
        buffer[:n_bytes], self._waiting = self._waiting[:n_bytes], self._waiting[n_bytes:]
        return n_bytes

    def _recoded(self, raw: bytes) -> bytes:
        text = self._decoder.decode(raw, final=not raw)
        if self._errors == "surrogateescape":
            text = _ESCAPED.sub("\udcff", text)  # whatever stands beside it, the byte 0xff is never UTF-8
        return text.encode("utf-8", self._errors)


def open_source(source: str | os.PathLike[str] | BinaryIO, encoding: str | None = None) -> Opened:
    """Open the source and refuse what can be seen at once: nothing to read in it, or no way to read it."""
    if isinstance(source, (str, os.PathLike)) and source != STANDARD_INPUT:
        file, name, owned = _open_path(os.fspath(source)), os.fspath(source), True
    elif source == STANDARD_INPUT:
        file, owned = _open_standard_input()
        name = "standard input"
    else:
        file, owned = _check_open_file(source), False
        name = str(getattr(source, "name", "") or "the open file")
    try:
        size = _bytes_left(file)
        if size is not None and size <= len(BOM) and file.read(size) in (b"", BOM):
            raise SourceError(f"no texts in {name}: it is empty")
        if size is not None and size <= len(BOM):
            file.seek(-size, os.SEEK_CUR)
    except BaseException:
        if owned:
            file.close()
        raise
    if encoding is None and isinstance(file, BufferedReader):
        return Opened(file, file, name, owned, size)
    return Opened(file, BufferedReader(_Converted(file, encoding), PIECE_BYTES), name, owned, size)


def _open_path(path: str) -> BinaryIO:
    try:
        return open(path, "rb", buffering=PIECE_BYTES)
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise SourceError(f"{path} is a directory; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SourceError(f"{path!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _open_standard_input() -> tuple[BinaryIO, bool]:
    """Standard input, and whether it is to be closed.

    It is opened anew on the same descriptor: a thread that still waits in `sys.stdin`'s own buffer when the
    interpreter ends makes it abort, as it cannot take that buffer's lock.
    """
    if sys.stdin is None:
        raise SourceError("standard input is closed; name a file")
    try:
        return open(sys.stdin.fileno(), "rb", buffering=PIECE_BYTES, closefd=False), True
    except (OSError, ValueError):  # no real file behind it, such as a replaced sys.stdin; or closed
        return _check_open_file(sys.stdin.buffer), False


def _check_open_file(source: object) -> BinaryIO:
    """An open file that gives bytes."""
    if isinstance(getattr(source, "file", source), (io.TextIOBase, codecs.StreamReaderWriter)):  # file: of tempfile
        raise OptionsError("the file is open in text mode; open it in binary mode ('rb')")
    if isinstance(source, io.RawIOBase):
        raise OptionsError("the file is open without a buffer; open it without buffering=0")
    if not hasattr(source, "readline"):
        raise OptionsError(f"{kind_of(source)} cannot be read; pass a path, '-', or a file opened with 'rb'")
    if getattr(source, "closed", False):
        raise SourceError(f"{getattr(source, 'name', 'the open file')} is closed already")
    return source  # type: ignore[return-value]  # what it lacks of BinaryIO is not used


def _bytes_left(file: BinaryIO) -> int | None:
    """Bytes from here to the end of a regular file or a buffer; None where that is not known."""
    if isinstance(file, io.BytesIO):
        return max(file.getbuffer().nbytes - file.tell(), 0)
    # Others may have a descriptor too, but of something else: a GzipFile's is that of the compressed file.
    if not isinstance(file, (io.BufferedReader, io.BufferedRandom)) or not isinstance(file.raw, io.FileIO):
        return None
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or (status.st_size == 0 and file.peek(1)):  # /proc says 0 of what has text
            return None
        return max(status.st_size - file.tell(), 0)
    except OSError:
        return None
