"""`.csv`: one text a row, from the first column or a named one."""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from asyncembed.errors import SourceError
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.lines import BOM, MAX_TEXT_BYTES, ONLY_RETURNS, LineReader, excerpt

_log = logging.getLogger("asyncembed")

_N_ROWS = 100
_OTHERS = {";": "';'", "\t": "tab", "|": "'|'"}
_NAMES = frozenset({"text", "texts", "content", "sentence", "title", "body", "document", "description", "question"})
_MAX_NAME_CHARS = 30
_ID = re.compile(r"[!-~]*\d[!-~]*")  # one word of ASCII with a digit in it

Rows = list[list[str]]


class CsvOptions(NamedTuple):
    """How the user says that a CSV file is to be read.

    Attributes:
        column: Name of the column of the texts; None takes the first.
        header: The first row holds names.
        delimiter: What stands between cells; None is a comma unless the file names another, and looks for others.
        escape: What takes its meaning from the character after it.
    """

    column: str | None = None
    header: bool = False
    delimiter: str | None = None
    escape: str | None = None


def check_dialect(lines: LineReader, beginning: bytes, how: CsvOptions) -> None:
    """Look at the first rows; say, once, what speaks against the way they will be read."""
    text = beginning.removeprefix(BOM).decode("utf-8", "replace")
    text = text.replace("\r\n", "\n")
    if text.count("\r") > text.count("\n"):
        _log.warning("%s: carriage returns are taken as parts of cells; if %s", lines.name, ONLY_RETURNS)
    text = text.translate({0: " ", ord("\r"): " "})  # they would end the reading
    rows = _rows(text, how.delimiter or ",", how.escape)
    if not rows:
        return
    found = _other_delimiter(text, rows, how) or _other_column(rows, how) or _sentences(rows, how)
    if found is not None and found.stops:
        raise SourceError(f"{lines.name}: {found.words}")
    if found is not None:
        _log.warning("%s: %s", lines.name, found.words)


def check_lines(lines: LineReader, beginning: bytes) -> None:
    """Look at the first lines of a file that is read line by line; say what speaks for another format."""
    text = beginning.removeprefix(BOM).decode("utf-8", "replace")
    tabs = [line.split("\t") for line in text.split("\n")[:_N_ROWS] if line]
    # 1. JSON; 2. the names of CSV's columns; 3. cells between tabs.
    if text.lstrip().startswith(("[{", '["', '{"')):
        kind, option = "JSON", "json"
    elif "," in (first := text.partition("\n")[0]) and ", " not in first and _looks_like_names(first.split(",")):
        kind, option = "CSV", "csv"
    elif len(tabs) > 1 and _share_of_width(tabs) > 0.9:
        kind, option = "a table with tabs", "csv --delimiter tab"
    else:
        return
    _log.warning(
        "%s looks like %s, and each line is taken as a text; --input-format %s reads it so", lines.name, kind, option
    )


class _Finding(NamedTuple):
    """What was found: a stop or a warning."""

    words: str
    stops: bool = False


def _rows(beginning: str, delimiter: str, escape: str | None) -> Rows:
    """The first rows that are not empty, leniently read."""
    reader = csv.reader(io.StringIO(beginning, newline="\n"), delimiter=delimiter, escapechar=escape)
    try:
        return list(islice(filter(None, reader), _N_ROWS))
    except csv.Error:
        return []  # reading them in earnest says what is wrong


def _share_of_width(rows: Rows) -> float:
    """How many rows are as wide as the first; none if that has one cell only."""
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows) if len(rows[0]) > 1 else 0.0


def _other_delimiter(beginning: str, rows: Rows, how: CsvOptions) -> _Finding | None:
    if how.delimiter is not None:
        if all(len(row) == 1 for row in rows) and _share_of_width(_rows(beginning, ",", how.escape)) > 0.9:
            return _Finding(f"no row has the delimiter {how.delimiter!r}; they may be divided by ','")
        return None
    for delimiter, option in _OTHERS.items():
        others = _rows(beginning, delimiter, how.escape)
        share = _share_of_width(others) if others else 0
        advice = f"--delimiter {option} reads it so, --delimiter ',' as it is"
        # 1. All rows agree on the other one, and not on the comma.
        if share > 0.9 and len(others) > 1 and _share_of_width(rows) < 0.9:
            kind = "tabs" if delimiter == "\t" else f"{delimiter!r}"
            return _Finding(f"the cells are divided by {kind}, not by commas; {advice}", stops=True)
        # 2. Many do.
        if share >= 0.5 and _share_of_width(rows) < share:
            return _Finding(f"rows may be divided by {option}; {advice}")
    return None


def _other_column(rows: Rows, how: CsvOptions) -> _Finding | None:
    if how.column is not None:
        return None
    has_names = how.header or _looks_like_names(rows[0])
    body = rows[1:] if has_names or (len(rows) > 2 and not _is_number(rows[0][0])) else rows
    texts = [row[0] for row in body if row[0].strip()]
    is_wide = any(len(row) > 1 for row in body)
    there_are = ", ".join(repr(cell[:_MAX_NAME_CHARS]) for cell in rows[0])
    advice = f"choose the column of the texts with --column NAME, by its name in the first row ({there_are})"
    # 1. Numbers; 2. ids; 3. a header that is read as a text.
    if texts and all(map(_is_number, texts)):
        if is_wide:
            return _Finding(f"the first column holds nothing but numbers, such as {texts[0]!r}; {advice}", stops=True)
        return _Finding(f"the texts are nothing but numbers, such as {texts[0]!r}")
    if is_wide and len(texts) > 1 and all(map(_ID.fullmatch, texts)):
        return _Finding(f"the first column looks like ids, such as {texts[0]!r}; {advice}")
    if not how.header and has_names:
        return _Finding("row 1 looks like column names and is taken as a text; --header skips it")
    return None


def _sentences(rows: Rows, how: CsvOptions) -> _Finding | None:
    """Sentences with commas that nobody quoted."""
    if how.delimiter is not None or how.header or how.column is not None:
        return None
    wide = [row for row in rows if len(row) > 1]
    n_sentences = sum(any(cell[:1] == " " and cell[1:2].isalpha() for cell in row[1:]) for row in wide)
    if not wide or n_sentences * 2 < len(wide):
        return None
    return _Finding(
        f"commas seem to belong to the texts, which end at the first one ({wide[0][0][:60]!r}); "
        "--input-format txt takes whole lines, --delimiter ',' cells as they are"
    )


def _is_number(text: str) -> bool:
    """A number, date or the like: digits, and no letters."""
    return any(map(str.isdigit, text)) and not any(map(str.isalpha, text))


def _looks_like_names(row: list[str]) -> bool:
    cells = [cell.strip() for cell in row]
    if cells[0] == "":  # pandas writes its index under no name
        cells = cells[1:] or cells
    if not all(cell.isidentifier() and len(cell) <= _MAX_NAME_CHARS for cell in cells):
        return False
    return len(row) > 1 or cells[0].lower() in _NAMES


def _load_csv() -> Any:
    """A csv module of our own: the limit of a cell, 131,072 characters, is one for all who use Python's.

    `CsvParser` refuses a row that is too long before this limit does, which keeps the message ours.
    """
    spec = importlib.util.find_spec("_csv")
    if spec is None or spec.loader is None:
        raise AssertionError("this Python has no csv module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.field_size_limit(2 * MAX_TEXT_BYTES)
    return module


_csv = _load_csv()

# Two characters travel through the csv module as others. Valid UTF-8 never decodes to a surrogate, so one outside the
# range that `surrogateescape` uses can stand in. NUL, which is legal in a text, is refused by Python 3.10's module; a
# carriage return that ends no line is a part of its cell, as pandas writes it, and the module would end the row there.
_STAND_INS = str.maketrans("\0\r", "\ud800\ud801")
_ORIGINALS = str.maketrans("\ud800\ud801", "\0\r")
_SEP_LINE = re.compile(rb'(?:\xef\xbb\xbf)?"?sep=([^\w"\r\n])"?\r?\n', re.IGNORECASE)
_QUOTED = re.compile('"[^"]*"')


class CsvParser:
    """Reads rows with the csv module in strict mode; a header is read when it is made, the rest as it is iterated.

    Raises:
        SourceError: The first rows speak for another dialect, the header cannot be read, or names no such column.
    """

    def __init__(self, lines: LineReader, how: CsvOptions) -> None:
        beginning = lines.beginning()
        # Excel's own way to name the delimiter, which it does not take for a row.
        if match := _SEP_LINE.match(beginning):
            lines.piece()
            how = how._replace(delimiter=how.delimiter or match[1].decode())
            beginning = beginning[match.end() :]
        self._lines = lines
        self._how = how
        self._delimiter = how.delimiter or ","
        self._row_line = 0
        self._row_bytes = 0
        self._row: list[str] = []  # the lines of the row under way
        self._has_stand_ins = False
        self._may_have_late_quote = False
        self._late_quote = re.compile(f'(?:^|{re.escape(self._delimiter)}) +"')
        self._bad: tuple[int, str] | None = None
        self._width = 0
        self._index = 0
        check_dialect(lines, beginning, how)
        self._rows = self._reader(self._feed(), strict=True)
        if how.header or how.column is not None:
            self._index = self._read_header(how.column)

    def __iter__(self) -> Iterator[SourceItem]:
        """Every row as a text, blank ones included, or as a bad row."""
        while (row := self._next_row()) is not None:
            yield self._to_item(row)

    def _reader(self, lines: Iterable[str], *, strict: bool) -> Iterator[list[str]]:
        """Rows, strictly; or, leniently, as they are meant where a blank stands before a quote."""
        rows: Iterator[list[str]] = _csv.reader(
            lines,
            delimiter=self._delimiter,
            escapechar=self._how.escape,
            strict=strict,
            skipinitialspace=not strict,
        )
        return rows

    def _feed(self) -> Iterator[str]:
        """The decoded lines that the csv module asks for, as a row may go over many."""
        while raw := self._lines.piece(self._lines.max_bytes + 1):
            self._row_bytes += len(raw)
            if self._row_bytes > self._lines.max_bytes:
                raise self._lines.error(self._lines.too_long(), self._row_line)
            text, reason = self._lines.decode(raw)
            if reason is not None and self._bad is None:
                self._bad = (self._lines.number, reason)
            if "\r" in text or "\0" in text:
                text = self._with_stand_ins(text)
            if ' "' in text and self._late_quote.search(text):
                self._may_have_late_quote = True
            self._row.append(text)
            yield text

    def _with_stand_ins(self, text: str) -> str:
        if self._lines.number == 1 and not self._lines.at_start_of_line and "\r" in _QUOTED.sub("", text):
            raise self._lines.error(ONLY_RETURNS)
        content = text.rstrip("\r\n")  # a file written in text mode on Windows ends its lines in "\r\r\n"
        if "\r" not in content and "\0" not in content:
            return text
        self._has_stand_ins = True
        return content.translate(_STAND_INS) + text[len(content) :]

    def _next_row(self) -> list[str] | Rejected | None:
        """The cells of the next row, what is wrong with it, or None at the end."""
        self._row_line = self._lines.number + 1
        self._row_bytes = 0
        self._row.clear()
        self._has_stand_ins = self._may_have_late_quote = False
        self._bad = None
        try:
            row = next(self._rows)
        except StopIteration:
            return None
        except _csv.Error as error:
            if "unexpected end of data" in str(error):
                reason = "the row that begins here has a quote that is never closed; close it, or double it inside"
                raise self._lines.error(reason, self._row_line) from error
            quote = "expected after" in str(error)
            return self._broken_row("a quote inside a quoted cell is not doubled" if quote else str(error))
        if self._may_have_late_quote and self._has_late_quote(row):
            return self._broken_row("a quote after a blank is no quote; take out the blank before it")
        if self._has_stand_ins:
            row = [cell.translate(_ORIGINALS) for cell in row]
        return row if self._bad is None else self._bad_row("", self._delimiter.join(row))

    def _has_late_quote(self, row: list[str]) -> bool:
        """Whether a cell begins with a blank and then a quote, which is meant to be one and is a letter to CSV."""
        if self._delimiter == " ":
            return False
        meant = next(self._reader(self._row, strict=False), [])
        return [cell.lstrip(" ") for cell in row] != [cell.lstrip(" ") for cell in meant]

    def _broken_row(self, reason: str) -> Rejected:
        """A row with a broken quote, after which the reader begins afresh with the next line."""
        row = "".join(self._row)
        if self._how.escape is not None:
            row = re.sub(re.escape(self._how.escape) + ".", "", row, flags=re.DOTALL)
        elif '\\"' in row:
            reason += "; --escape '\\' is for quotes after a backslash"
        if not _ends_with_its_line(row, self._delimiter):
            raise self._lines.error(f"{reason}, and where the row ends cannot be told; mend it", self._row_line)
        return self._bad_row(reason)

    def _bad_row(self, reason: str, content: str | None = None) -> Rejected:
        """A row to skip; a byte that is not UTF-8 is the reason that counts, and its line the place."""
        line, reason = self._bad or (self._row_line, reason)
        return Rejected(reason, line=line, content=None if content is None else excerpt(content), skipped=True)

    def _to_item(self, row: list[str] | Rejected) -> SourceItem:
        # 1. A bad row.
        if isinstance(row, Rejected):
            return row
        # 2. A row in which a delimiter belongs to a text, or that is no row of this table.
        self._width = self._width or len(row)
        if len(row) > self._width:
            advice = "quote a cell that holds a delimiter; --input-format txt takes whole lines"
            reason = f"{len(row)} cells, but the first row has {self._width}: {advice}"
            return self._bad_row(reason, self._delimiter.join(row))
        # 3. A text.
        if len(row) > self._index:
            return Text(row[self._index], line=self._row_line)
        # 4. A blank row: counted like a blank cell.
        if not any(cell.strip() for cell in row):
            return Text("", line=self._row_line)
        # 5. A row that ends before the column.
        return self._bad_row(
            f"{len(row)} cells, but the texts are in column {self._index + 1}", self._delimiter.join(row)
        )

    def _read_header(self, column: str | None) -> int:
        """Read the first row that is not blank and return the position of `column` in it."""
        names: list[str] | Rejected | None = []
        while names == []:
            names = self._next_row()
        if names is None:
            raise SourceError(f"no texts in {self._lines.name}: it has not even a header row")
        if isinstance(names, Rejected):
            raise self._lines.error(names.reason, names.line)
        self._width = len(names)
        if column is None:
            return 0
        there_are = ", ".join(map(repr, names))
        if names.count(column) != 1:
            how = "no column" if column not in names else "more than one column"
            raise self._lines.error(f"{how} {column!r}; there are {there_are}", self._row_line)
        return names.index(column)


def _ends_with_its_line(row: str, delimiter: str) -> bool:
    """Whether a row with a broken quote surely ends where its last line does.

    It does if its quotes are even in number, so that each that opens is closed, and if those that stand before a
    delimiter or a line end close every cell that begins with one.
    """
    end = f"[{re.escape(delimiter)}\r\n]|\\Z"
    cell = f'"[^"]*(?:"(?!{end})[^"]*)*"(?={end})|(?!")[^{re.escape(delimiter)}\n]*'
    return row.count('"') % 2 == 0 and bool(
        re.fullmatch(f"(?:(?:{cell}){re.escape(delimiter)})*(?:{cell})[\r\n]*", row)
    )
