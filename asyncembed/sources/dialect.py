"""What the first rows of a CSV file speak for: another delimiter, sentences, or a column that holds no texts."""

from __future__ import annotations

import csv
import io
import logging
import re
from itertools import islice
from typing import NamedTuple

from asyncembed.errors import SourceError
from asyncembed.sources.lines import BOM, ONLY_RETURNS, LineReader

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
