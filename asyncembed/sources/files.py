"""Text files as a synchronous stream of texts, one pass, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, get_args

from asyncembed.errors import ClosedError, OptionsError, SourceError
from asyncembed.options import InputFormat, OnBadRow
from asyncembed.records import Rejected, SourceItem
from asyncembed.sources.csv_rows import CsvParser
from asyncembed.sources.json_values import JsonParser
from asyncembed.sources.lines import LineReader
from asyncembed.sources.opening import STANDARD_INPUT, Opened, open_source
from asyncembed.sources.text_lines import parse_lines


class _Format(NamedTuple):
    """How a format is read.

    Attributes:
        parse: From lines, `column` and `header` to items; called once.
        has_columns: Whether `column` and `header` mean something.
    """

    parse: Callable[[LineReader, str | None, bool], Iterable[SourceItem]]
    has_columns: bool = False


FORMATS: dict[str, _Format] = {
    "txt": _Format(lambda lines, column, header: parse_lines(lines)),
    "csv": _Format(CsvParser, has_columns=True),
    "json": _Format(lambda lines, column, header: JsonParser(lines)),
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
        self, opened: Opened, how: _Format, column: str | None, header: bool, skip: bool, limit: int | None
    ) -> None:
        self.name = opened.name
        self.bytes_total = opened.size
        self.n_texts = 0
        self.n_blank = 0
        self.n_bad = 0
        self._opened = opened
        self._skip = skip
        self._limit = limit
        self._ended = False
        self._lines = LineReader(opened.file, opened.name)
        self._items: Iterator[SourceItem] | None = None
        self._start: Callable[[], Iterator[SourceItem]] = lambda: iter(
            how.parse(self._lines, column, header or column is not None)
        )
        # A regular file answers at once, so a missing column is known now; a pipe may keep us waiting.
        if opened.size is not None:
            self._items = self._start()

    def __repr__(self) -> str:
        state = " ended" if self._ended else ""
        return f"<FileTexts {self.name!r} texts={self.n_texts} blank={self.n_blank} bad={self.n_bad}{state}>"

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far."""
        return self._lines.bytes_read

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
                if not self._skip:
                    advice = "fix it, or go on without such rows with --on-bad-row skip"
                    raise self._lines.error(f"{item.reason}; {advice}", item.line)
                self.n_bad += 1
                return item
            if not item.text or item.text.isspace():
                self.n_blank += 1
                continue
            self.n_texts += 1
            return item
        return None

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
    on_bad_row: OnBadRow = "stop",
    limit: int | None = None,
) -> FileTexts:
    """Open a text file for one pass over its texts.

    Args:
        source: A path, `-` for standard input (read from its descriptor, past what `sys.stdin` has buffered), or an
            open binary file, which is left open.
        input_format: `auto` goes by the extension; standard input and open files are `txt`.
        column: Name of the CSV column of the texts; implies `header`.
        header: The first row of a CSV file holds names.
        on_bad_row: `stop` raises at a row that cannot be a text; `skip` gives it as a `Rejected` and goes on.
        limit: Stop after so many texts.

    Raises:
        OptionsError: Options that cannot be, or do not go together.
        SourceError: The file is missing, cannot be opened, is empty, has an unknown extension or no such column.
    """
    if input_format != "auto" and input_format not in FORMATS:
        raise OptionsError(f"input_format={input_format!r} is not one of 'auto', {', '.join(map(repr, FORMATS))}")
    if on_bad_row not in get_args(OnBadRow):
        raise OptionsError(f"on_bad_row={on_bad_row!r} is not one of 'stop', 'skip'")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise OptionsError(f"limit={limit!r} must be a whole number of at least 1, or None")
    how = FORMATS[_format_of(source) if input_format == "auto" else input_format]
    if (column is not None or header) and not how.has_columns:
        option = "--column" if column is not None else "--header"
        raise OptionsError(f"{option} goes with CSV only; if this is CSV, add --input-format csv")
    opened = open_source(source)
    try:
        return FileTexts(opened, how, column, header, on_bad_row == "skip", limit)
    except BaseException:
        if opened.owned:
            opened.file.close()
        raise


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
    known = ", ".join(f".{name}" for name in FORMATS)
    raise SourceError(f"{path}: cannot tell the format (known: {known}); name it with --input-format")
