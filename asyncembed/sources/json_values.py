"""`.json`: a list of texts, or an object whose values are texts and whose keys are kept."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

import ijson

from asyncembed.errors import SourceError
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.lines import BOM, JSON_LINES, LineReader, excerpt, find_bad_byte

MAX_DEPTH = 100
"""Nesting beyond this is refused; texts stand at depth 1, what is deeper is skipped over as one bad row."""

_MAX_REASON_CHARS = 120
_OPENING = {"start_array": "a list", "start_map": "an object"}
_CLOSING = ("end_array", "end_map")
_KINDS = {"null": "null", "boolean": "true or false", "number": "a number", "string": "a string"}

# ijson's C parser turns a lone half of a surrogate pair into "?" or breaks on it, and stops at a byte that is not
# UTF-8. Both travel through it under an alias: "\0", a random word of this process, four hex digits, "\0".
_WORD = secrets.token_hex(8)
_ALIAS = re.compile(f"\0{_WORD}([0-9a-f]{{4}})\0")
_PAIR = r"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"\\(?:u{_PAIR}|u(?P<half>[dD][89a-fA-F][0-9a-fA-F]{{2}})|.|\Z)|(?P<bad>[\udc80-\udcff])", re.S)
_LONGEST_ESCAPE = len(r"\ud83d\ude00")
_NEEDS_ALIAS = re.compile(r"\\u[dD][89a-fA-F]|[\udc80-\udcff]")


class JsonParser:
    """Streams the texts of a JSON file: nothing nested is built, a line of any length is read in pieces."""

    def __init__(self, lines: LineReader) -> None:
        if _is_json_lines(lines.beginning()):
            raise SourceError(f"{lines.name}: this is JSON lines, a value in each line; {JSON_LINES}")
        self._lines = lines
        self._depth = 0
        self._in_object = False
        self._ended = False  # the top level has closed
        self._key: str | None = None

    def __iter__(self) -> Iterator[SourceItem]:
        """Every value as a text, blank ones included, or as a bad row.

        Raises:
            SourceError: It is not JSON or of another shape. It cannot be skipped: nothing after it can be trusted.
        """
        events: list[tuple[str, Any]] = ijson.sendable_list()
        parser = ijson.basic_parse_coro(events)
        try:
            yield from self._parse(parser, events)
        finally:
            # Left half-way, the parser complains of that when it is collected.
            with contextlib.suppress(ijson.JSONError, ValueError):
                parser.close()

    def _parse(self, parser: Any, events: list[tuple[str, Any]]) -> Iterator[SourceItem]:
        sanitizer = _Sanitizer()
        n_waiting = 0  # bytes read since the last event: a string under way, or white space
        seen = False
        while True:
            raw = self._lines.piece()
            text = sanitizer.feed(raw)
            seen = seen or not (text == "" or text.isspace())
            if not raw and not seen:
                return  # nothing but white space: no texts, rather than broken JSON
            error = _send(parser, text.encode("utf-8", "surrogatepass"), events, last=not raw and not self._ended)
            had_ended = self._ended
            n_waiting = 0 if events else n_waiting + len(raw)
            for event, value in events:
                yield from self._on_event(event, value)
            events.clear()
            if error is None and self._ended and _goes_on(parser, text, had_ended, last=not raw):
                error = SourceError(_TRAILING)
            if error is not None:
                raise self._lines.error(self._syntax_reason(error, sanitizer)) from error
            if n_waiting > self._lines.max_bytes:
                raise self._lines.error(self._lines.too_long())
            if not raw:
                return

    def _on_event(self, event: str, value: Any) -> Iterator[SourceItem]:
        # 1. Something closes; 2. a key; 3. the top level opens; 4. a value among the texts; 5. deeper: passed over.
        if event in _CLOSING:
            self._depth -= 1
            self._ended = self._depth == 0
        elif event == "map_key":
            if self._depth == 1:
                self._key = value
        elif self._depth == 0:
            if event not in _OPENING:
                raise self._lines.error(f"{_KINDS[event]} alone; {_EXPECTED}")
            self._in_object = event == "start_map"
        elif self._depth == 1:
            yield self._to_item(event, value)
        if event in _OPENING:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise self._lines.error(f"nested deeper than {MAX_DEPTH}; {_EXPECTED}")

    def _to_item(self, event: str, value: Any) -> SourceItem:
        line = self._lines.number
        key, bad_in_key = _restore(self._key) if self._in_object and self._key is not None else (None, None)
        if key is not None and bad_in_key is not None:
            key = excerpt(key)
        # 1. A nested list or object, a number, true, false or null.
        if event != "string":
            kind = _OPENING.get(event) or _KINDS[event]
            content = "…" if event in _OPENING else excerpt(_literal(value))
            hint = _OBJECTS if event == "start_map" and not self._in_object else ""
            return Rejected(f"{kind} where a text should be{hint}", key, line, content, skipped=True)
        text, bad = _restore(value)
        if len(text) > self._lines.max_bytes:
            raise self._lines.error(self._lines.too_long())
        # 2. A byte that is not UTF-8 in the key or the text.
        if bad is None:
            bad = bad_in_key
        if bad is not None:
            return Rejected(self._lines.bad_byte_reason(bad), key, line, excerpt(text), skipped=True)
        # 3. A text.
        return Text(text, key, line)

    def _syntax_reason(self, error: Exception, sanitizer: _Sanitizer) -> str:
        if sanitizer.bad_byte is not None and (_WORD in str(error) or isinstance(error, UnicodeError)):
            return f"not JSON: {self._lines.bad_byte_reason(sanitizer.bad_byte)}"
        said = str(error).splitlines()[0].removeprefix("parse error: ").removeprefix("lexical error: ")
        if "trailing garbage" in said or "Additional data" in said:
            said = _TRAILING
        elif "premature EOF" in said or "Incomplete JSON" in said:
            said = "the file ends in the middle"
        return f"not JSON: {said[:_MAX_REASON_CHARS].strip()}; {_EXPECTED}"


_TRAILING = "something follows the end of the list or object"
_EXPECTED = "expected one list of texts, or one object whose values are texts"
_OBJECTS = "; jq 'map(.text)' FILE > texts.json makes texts of a list of objects"


def _is_json_lines(beginning: bytes) -> bool:
    """Whether the first line is a whole object or list, and another begins in the next."""
    first, _, rest = beginning.removeprefix(BOM).lstrip().partition(b"\n")
    if not (first.startswith((b"{", b"[")) and rest.lstrip().startswith((b"{", b"["))):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


class _Sanitizer:
    """Decodes pieces of JSON and puts what ijson would spoil under an alias.

    Attributes:
        bad_byte: The last byte that was not UTF-8; None if all were.
    """

    def __init__(self) -> None:
        self.bad_byte: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._held = ""

    def feed(self, raw: bytes) -> str:
        """The text of a piece; an escape that its end may have cut is held back for the next. b"" ends the file."""
        text = self._held + self._decoder.decode(raw, final=not raw)
        self._held = ""
        whole = not raw or raw.endswith(b"\n")
        if not whole and "\\" in text[-_LONGEST_ESCAPE:]:
            # Escapes are matched from the start of the piece, so that `\\\\ud83d` is read as it is meant.
            for match in _ESCAPE.finditer(text):
                if match.start() >= len(text) - _LONGEST_ESCAPE:
                    text, self._held = text[: match.start()], text[match.start() :]
                    break
        return _ESCAPE.sub(self._alias, text) if _NEEDS_ALIAS.search(text) else text

    def _alias(self, match: re.Match[str]) -> str:
        # 1. A lone half of a surrogate pair; 2. a byte that is not UTF-8; 3. any other escape stays.
        if match["half"]:
            return f"\\u0000{_WORD}{match['half'].lower()}\\u0000"
        if match["bad"]:
            self.bad_byte = find_bad_byte(match["bad"])
            return f"\\u0000{_WORD}00{self.bad_byte:02x}\\u0000"
        return match[0]


def _restore(text: str) -> tuple[str, int | None]:
    """A string with its aliases undone, and the first byte in it that was not UTF-8."""
    if _WORD not in text:
        return text, None
    codes = [int(code, 16) for code in _ALIAS.findall(text)]
    bad = next((code for code in codes if code < 0x100), None)

    def original(match: re.Match[str]) -> str:
        code = int(match[1], 16)
        return chr(code + 0xDC00 if code < 0x100 else code)

    return _ALIAS.sub(original, text), bad


def _send(parser: Any, data: bytes, events: list[tuple[str, Any]], *, last: bool) -> Exception | None:
    """Feed the parser; what it raises is returned, so that the events before it can be delivered first."""
    try:
        if data:
            parser.send(data)
        if last:
            parser.close()
    except SystemError as error:
        # The C parser appends an event without a value when a number has more digits than Python converts.
        events.pop()
        return SourceError(f"a number with too many digits ({error.__cause__ or 'cannot be converted'})")
    except (ijson.JSONError, ValueError) as error:  # ValueError: what the pure Python parser lets through
        return error
    return None


def _goes_on(parser: Any, text: str, had_ended: bool, *, last: bool) -> bool:
    """Whether something that is no token yet follows the end, of which the C parser says nothing."""
    rest = text.rstrip(" \t\n\r")
    if rest and (had_ended or rest[-1] not in "]}"):
        return True
    if not last:
        return False
    try:
        parser.send(b"[")
    except (ijson.JSONError, ValueError):
        return False
    return True  # it took that as a part of a string that is open


def _literal(value: object) -> str:
    """A scalar as JSON writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)
