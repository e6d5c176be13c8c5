"""`.txt`: one text a line."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.dialect import check_lines
from asyncembed.sources.lines import MAX_CONTENT_CHARS, ONLY_RETURNS, LineReader, excerpt

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
