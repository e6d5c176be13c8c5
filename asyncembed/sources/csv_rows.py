"""`.csv`: one text a row, from the first column or a named one."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator

from asyncembed.errors import SourceError
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.lines import LineReader, decode, excerpt

_log = logging.getLogger("asyncembed")
_NAMES = frozenset({"text", "texts", "content", "sentence", "title", "body", "document", "description", "question"})
_MAX_NAME_CHARS = 30

# Python 3.10's csv module refuses NUL, which is legal in a text. Valid UTF-8 never decodes to a surrogate, so one
# outside the range that `surrogateescape` uses can stand in for it.
_NUL_STAND_IN = "\ud800"


class CsvParser:
    """Reads rows with the csv module in strict mode; a header is read when it is made, the rest as it is iterated.

    Args:
        lines: The file.
        column: Name of the column of the texts; None takes the first.
        header: The first row holds names.

    Raises:
        SourceError: The header cannot be read, or names no such column.
    """

    def __init__(self, lines: LineReader, column: str | None, header: bool) -> None:
        self._lines = lines
        self._row_line = 0
        self._row_bytes = 0
        self._bad: tuple[int, str] | None = None
        # The csv module's own limit is 131,072 characters a cell and holds for the whole process, so it is only ever
        # raised. `_feed` refuses a longer row before this limit does, which keeps the message ours.
        csv.field_size_limit(max(csv.field_size_limit(), lines.max_bytes + 1))
        self._rows = csv.reader(self._feed(), strict=True)
        self._index = 0
        self._check_first_row = not header and column is None
        if not self._check_first_row:
            self._index = self._read_header(column)

    def __iter__(self) -> Iterator[SourceItem]:
        """Every row as a text, blank ones included, or as a bad row."""
        while (row := self._next_row()) is not None:
            if self._check_first_row and row:
                self._check_first_row = False
                if isinstance(row, list):
                    _warn_of_names(self._lines.name, row)
            yield self._to_item(row)

    def _feed(self) -> Iterator[str]:
        """The decoded lines that the csv module asks for, as a row may go over many."""
        while raw := self._lines.piece(self._lines.max_bytes + 1):
            self._row_bytes += len(raw)
            if self._row_bytes > self._lines.max_bytes:
                raise self._lines.error(self._lines.too_long(), self._row_line)
            text, reason = decode(raw)
            if reason is not None and self._bad is None:
                self._bad = (self._lines.number, reason)
            yield text.replace("\0", _NUL_STAND_IN)

    def _next_row(self) -> list[str] | Rejected | None:
        """The cells of the next row, what is wrong with it, or None at the end.

        Raises:
            SourceError: A quote is never closed, so that nothing after it can be trusted.
        """
        self._row_line = self._lines.number + 1
        self._row_bytes = 0
        self._bad = None
        try:
            row = next(self._rows)
        except StopIteration:
            return None
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                reason = "the row that begins here has a quote that is never closed; close it, or double it inside"
                raise self._lines.error(reason, self._row_line) from error
            return self._bad_row(_csv_reason(error))  # the reader begins afresh with the next line
        if self._bad is not None:
            return self._bad_row("", ",".join(row))
        return [cell.replace(_NUL_STAND_IN, "\0") for cell in row]

    def _bad_row(self, reason: str, content: str | None = None) -> Rejected:
        """A row to skip; a byte that is not UTF-8 is the reason that counts, and its line the place."""
        line, reason = self._bad or (self._row_line, reason)
        if content is not None:
            content = excerpt(content.replace(_NUL_STAND_IN, "\0"))
        return Rejected(reason, line=line, content=content, skipped=True)

    def _to_item(self, row: list[str] | Rejected) -> SourceItem:
        # 1. A bad row.
        if isinstance(row, Rejected):
            return row
        # 2. A text.
        if len(row) > self._index:
            return Text(row[self._index], line=self._row_line)
        # 3. A blank row: counted like a blank cell.
        if not any(cell.strip() for cell in row):
            return Text("", line=self._row_line)
        # 4. A row that ends before the column.
        return self._bad_row(f"{len(row)} cells, but the texts are in column {self._index + 1}", ",".join(row))

    def _read_header(self, column: str | None) -> int:
        """Read the first row that is not blank and return the position of `column` in it."""
        names: list[str] | Rejected | None = []
        while names == []:
            names = self._next_row()
        if names is None:
            raise SourceError(f"no texts in {self._lines.name}: it has not even a header row")
        if isinstance(names, Rejected):
            raise self._lines.error(names.reason, names.line)
        if column is None:
            return 0
        there_are = ", ".join(map(repr, names))
        if names.count(column) != 1:
            how = "no column" if column not in names else "more than one column"
            raise self._lines.error(f"{how} {column!r}; there are {there_are}", self._row_line)
        return names.index(column)


def _csv_reason(error: csv.Error) -> str:
    """The csv module's complaint in words that help."""
    if "new-line character" in str(error):
        return "a carriage return outside quotes; a line ends at \\n or \\r\\n"
    if "expected after" in str(error):
        return "a quote inside a quoted cell is not doubled"
    return str(error)


def _warn_of_names(name: str, row: list[str]) -> None:
    """Say that --header exists if the first row looks like column names; it stays a text all the same."""
    cells = [cell.strip() for cell in row]
    if not all(cell.isidentifier() and len(cell) <= _MAX_NAME_CHARS for cell in cells):
        return
    if len(cells) > 1 or cells[0].lower() in _NAMES:
        _log.warning("%s: row 1 looks like column names and is taken as a text; --header skips it", name)
