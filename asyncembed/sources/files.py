"""Text files as a synchronous stream of texts, one pass, in bounded memory."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

from asyncembed.errors import ClosedError, OptionsError, SourceError
from asyncembed.options import InputFormat, OnBadRow
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.csv_rows import CsvOptions, CsvParser, check_lines
from asyncembed.sources.json_values import JsonParser
from asyncembed.sources.lines import (
    BOM,
    MAX_CONTENT_CHARS,
    ONLY_RETURNS,
    PIECE_BYTES,
    LineReader,
    advice_by_bytes,
    advice_by_name,
    excerpt,
)
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


_log = logging.getLogger("asyncembed")


def parse_lines(lines: LineReader) -> Iterator[SourceItem]:
    r"""Every line as a text, blank ones included; a line ends at `\n` or `\r\n` and is not stripped otherwise.

    Raises:
        SourceError: The file has carriage returns and no other line end.
    """
    check_lines(lines, lines.beginning())
    has_warned = False
    while True:
        before = lines.number
        raw, whole = lines.line()
        number = before + 1
        # 1. The end of the file.
        if lines.number == before:
            return
        # 2. Carriage returns where line ends should be, or within a line.
        if not has_warned and b"\r" in raw:
            if number == 1 and not lines.at_start_of_line:
                raise lines.error(ONLY_RETURNS)
            has_warned = True
            _log.warning("%s:%d: a carriage return within the line is taken as part of the text", lines.name, number)
        # 3. An endless line.
        if not whole:
            beginning = raw[: 4 * MAX_CONTENT_CHARS].decode("utf-8", "replace")
            yield Rejected(lines.too_long(), line=number, content=excerpt(beginning), skipped=True)
            continue
        # 4. A line in another encoding, or 5. a text.
        text, reason = lines.decode(raw)
        if reason is not None:
            yield Rejected(reason, line=number, content=excerpt(text), skipped=True)
        else:
            yield Text(text, line=number)


class _Format(NamedTuple):
    """How a format is read.

    Attributes:
        parse: From lines to items; called once.
        has_columns: Whether the options of CSV mean something.
    """

    parse: Callable[[LineReader, CsvOptions], Iterable[SourceItem]]
    has_columns: bool = False


FORMATS: dict[str, _Format] = {
    "txt": _Format(lambda lines, how: parse_lines(lines)),
    "csv": _Format(CsvParser, has_columns=True),
    "json": _Format(lambda lines, how: JsonParser(lines)),
}
"""The formats by name, which is also the extension they go by."""


class FileTexts:
    """The texts of a file, in order: iterate it once, from one thread at a time.

    Made by `read_texts`. It closes the file that it opened when it ends, fails, or is closed.

    Attributes:
        name: The file in messages; "standard input" for `-`.
        bytes_total: Size of what there is to read; None where it is not known, as for a pipe.
        n_texts: Texts given so far.
        n_blank: Blank lines, cells and values passed over so far.
        n_bad: Bad rows skipped so far.
    """

    def __init__(
        self,
        opened: Opened,
        parse: Callable[[LineReader], Iterable[SourceItem]],
        *,
        encoding: str,
        skip: bool,
        limit: int | None,
    ) -> None:
        self.name = opened.name
        self.bytes_total = opened.size
        self.n_texts = 0
        self.n_blank = 0
        self.n_bad = 0
        self._opened = opened
        self._parse = parse
        self._skip = skip
        self._limit = limit
        self._ended = False
        self._lines = LineReader(opened.reader, opened.name, encoding)
        self._items: Iterator[SourceItem] | None = None
        # A regular file answers at once, so what is wrong with its first rows is known now; a pipe may keep us waiting.
        if opened.size is not None:
            self._items = self._start()

    def __repr__(self) -> str:
        state = " ended" if self._ended else ""
        return f"<FileTexts {self.name!r} texts={self.n_texts} blank={self.n_blank} bad={self.n_bad}{state}>"

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far."""
        converted = self._opened.bytes_converted
        return self._lines.bytes_read if converted is None else converted

    def __iter__(self) -> FileTexts:
        """Itself.

        Raises:
            ClosedError: It has ended; read the file anew.
        """
        if self._ended:
            raise ClosedError(f"{self.name} has been read to its end or closed; call read_texts again to read it anew")
        return self

    def __next__(self) -> SourceItem:
        """The next text, or the next bad row that is skipped.

        Raises:
            SourceError: A bad row and `on_bad_row="stop"`, what cannot be read further, or no texts at all.
        """
        if self._ended:
            raise StopIteration
        try:
            item = self._next_item()
        except BaseException:
            self.close()
            raise
        if item is None:
            self.close()
            raise StopIteration
        return item

    def _next_item(self) -> SourceItem | None:
        if self._items is None:
            self._items = self._start()
        while self._limit is None or self.n_texts < self._limit:
            item = next(self._items, None)
            # 1. The end; 2. a bad row; 3. a blank; 4. a text.
            if item is None:
                if not self.n_texts and not self.n_bad:
                    blanks = f": {self.n_blank} blank and nothing else" if self.n_blank else ""
                    raise SourceError(f"no texts in {self.name}{blanks}")
                return None
            if isinstance(item, Rejected):
                self._refuse(item)
                self.n_bad += 1
                return item
            if not item.text or item.text.isspace():
                self.n_blank += 1
                continue
            self.n_texts += 1
            return item
        return None

    def _start(self) -> Iterator[SourceItem]:
        """The items; the first rows are read before the first is given.

        So nothing is embedded of a file that is refused for the form of its first rows, and a bad row among them is
        told before a model is loaded.
        """
        beginning = self._lines.beginning()
        if (advice := advice_by_bytes(beginning)) is not None:
            raise SourceError(f"{self.name}: {advice}")
        items = iter(self._parse(self._lines))
        # Of a pipe, only what has arrived, up to the last line end: nothing waits for more.
        n_bytes = beginning.rfind(b"\n") if self.bytes_total is None else len(beginning)
        first: list[SourceItem] = []
        while self._lines.bytes_read <= n_bytes and (self._limit is None or len(first) < self._limit):
            item = next(items, None)
            if item is None:
                break
            if isinstance(item, Rejected):
                self._refuse(item)
            first.append(item)
        return chain(first, items)

    def _refuse(self, item: Rejected) -> None:
        if not self._skip:
            advice = "fix it, or go on without such rows with --on-bad-row skip"
            raise self._lines.error(f"{item.reason}; {advice}", item.line)

    def close(self) -> None:
        """Close the file if it was opened here, and end the iteration. Idempotent."""
        self._ended = True
        if self._opened.owned:
            self._opened.file.close()

    def __enter__(self) -> FileTexts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_texts(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    input_format: InputFormat = "auto",
    column: str | None = None,
    header: bool = False,
    delimiter: str | None = None,
    encoding: str | None = None,
    escape: str | None = None,
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
) -> FileTexts:
    """Open a text file for one pass over its texts.

    Raises:
        OptionsError: Options that cannot be, or do not go together.
        SourceError: The file is missing, cannot be opened, is empty, is of another kind or has no such column; or,
            of a file that is no pipe, its first rows cannot be read.
    """
    if input_format != "auto" and input_format not in FORMATS:
        raise OptionsError(f"input_format={input_format!r} is not one of 'auto', {', '.join(map(repr, FORMATS))}")
    if on_bad_row not in get_args(OnBadRow):
        raise OptionsError(f"on_bad_row={on_bad_row!r} is not one of 'stop', 'skip'")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise OptionsError(f"limit={limit!r} must be a whole number of at least 1, or None")
    how = FORMATS[_format_of(source) if input_format == "auto" else input_format]
    csv = CsvOptions(column, header, _one_character("delimiter", delimiter), _one_character("escape", escape))
    if not how.has_columns:
        for option, value in csv._asdict().items():
            if value:
                raise OptionsError(f"--{option} goes with CSV only; if this is CSV, add --input-format csv")
    if csv.escape in (csv.delimiter or ",", " "):
        raise OptionsError(f"escape={escape!r} cannot be a blank or the delimiter; it is often a backslash")
    recoded = _encoding_of(encoding)
    opened = open_source(source, recoded)
    try:
        return FileTexts(
            opened,
            lambda lines: how.parse(lines, csv),
            encoding=recoded or "UTF-8",
            skip=on_bad_row == "skip",
            limit=limit,
        )
    except BaseException:
        if opened.owned:
            opened.file.close()
        raise


def _one_character(name: str, value: str | None) -> str | None:
    """A delimiter or an escape, a tab also by its name."""
    if value is None:
        return None
    named = "\t" if value in ("tab", "\\t") else value
    if not isinstance(named, str) or len(named) != 1 or named in '"\r\n\0' or "\ud800" <= named <= "\udfff":
        raise OptionsError(f"{name}={value!r} must be one character other than a quote or a line end, or 'tab'")
    return named


def _encoding_of(encoding: str | None) -> str | None:
    """The name of an encoding that has to be converted; None for UTF-8."""
    if encoding is None:
        return None
    try:
        "".encode(encoding)  # refuses codecs that are for something else than text
        return None if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig") else encoding
    except (LookupError, TypeError, ValueError):
        raise OptionsError(
            f"encoding={encoding!r} is not known; there are utf-8, utf-16, cp1252, shift_jis, …"
        ) from None


def _format_of(source: str | os.PathLike[str] | BinaryIO) -> str:
    """The name of the format by the extension of the source."""
    if not isinstance(source, (str, os.PathLike)) or source == STANDARD_INPUT:
        return "txt"
    path = os.fspath(source)
    extension = Path(path).suffix.lower()
    if extension[1:] in FORMATS:
        return extension[1:]
    if os.path.isdir(path):
        raise SourceError(f"{path} is a directory; name a file in it")
    if (advice := advice_by_name(extension)) is not None:
        raise SourceError(f"{path}: {advice}")
    known = ", ".join(f".{name}" for name in FORMATS)
    raise SourceError(f"{path}: cannot tell the format (known: {known}); name it with --input-format")
