"""`.txt`: one text a line."""

from __future__ import annotations

from collections.abc import Iterator

from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.lines import MAX_CONTENT_CHARS, LineReader, decode, excerpt


def parse_lines(lines: LineReader) -> Iterator[SourceItem]:
    r"""Every line as a text, blank ones included; a line ends at `\n` or `\r\n` and is not stripped otherwise."""
    while True:
        before = lines.number
        raw, whole = lines.line()
        number = before + 1
        # 1. The end of the file.
        if lines.number == before:
            return
        # 2. An endless line.
        if not whole:
            beginning = raw[: 4 * MAX_CONTENT_CHARS].decode("utf-8", "replace")
            yield Rejected(lines.too_long(), line=number, content=excerpt(beginning), skipped=True)
            continue
        # 3. A line in another encoding, or 4. a text.
        text, reason = decode(raw)
        if reason is not None:
            yield Rejected(reason, line=number, content=excerpt(text), skipped=True)
        else:
            yield Text(text, line=number)
