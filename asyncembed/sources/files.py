"""Text files as a synchronous stream of texts, one pass, in bounded memory."""

from __future__ import annotations

import codecs
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, get_args

from asyncembed.errors import ClosedError, OptionsError, SourceError
from asyncembed.options import InputFormat, OnBadRow
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.csv_rows import CsvParser
from asyncembed.sources.dialect import CsvOptions, check_lines
from asyncembed.sources.json_values import JsonParser
from asyncembed.sources.lines import (
    MAX_CONTENT_CHARS,
    ONLY_RETURNS,
    LineReader,
    advice_by_bytes,
    advice_by_name,
    excerpt,
)
from asyncembed.sources.opening import STANDARD_INPUT, Opened, open_source

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
