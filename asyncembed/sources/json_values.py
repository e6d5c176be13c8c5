"""`.json`: a list of texts, or an object whose values are texts and whose keys are kept."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C function behind json.loads, absent in stubs

from asyncembed.errors import SourceError
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources.lines import BOM, JSON_LINES, PIECE_BYTES, LineReader, excerpt, find_bad_byte

MAX_DEPTH = 100
"""Nesting beyond this is refused; texts stand at depth 1, what is deeper is skipped over as one bad row."""

_MAX_DIGITS = 4300  # Python converts no longer whole numbers
_LONGEST_ESCAPE = len(r"\ud83d\ude00")
_BLANKS = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"null": "null", "true": "true or false", "false": "true or false"}
_KINDS = {"[": "a list", "{": "an object"}
_EXPECTED = "expected one list of texts, or one object whose values are texts"
_OBJECTS = "; jq 'map(.text)' FILE > texts.json makes texts of a list of objects"

# What may come next, and what is said where something else comes.
_VALUE = "unallowed token at this point in JSON text"
_KEY = "invalid object key (must be a string)"
_COLON = "object key and value must be separated by a colon (':')"
_LIST_GOES_ON = "after array element, I expect ',' or ']'"
_OBJECT_GOES_ON = "after key and value, inside map, I expect ',' or '}'"
_AFTER = {"[": _LIST_GOES_ON, "{": _OBJECT_GOES_ON, "": "something follows the end of the list or object"}
_CLOSING = {"[": "]", "{": "}"}
_SAID = {
    "Invalid control": "invalid character inside string",
    "Invalid \\escape": "inside a string, '\\' occurs before a character which it may not",
    "Invalid \\uXXXX": "invalid (non-hex) character occurs after '\\u' inside string",
}


class JsonParser:
    """Streams the texts of a JSON file: nothing nested is built, a line of any length is read in pieces."""

    def __init__(self, lines: LineReader) -> None:
        if _is_json_lines(lines.beginning()):
            raise SourceError(f"{lines.name}: this is JSON lines, a value in each line; {JSON_LINES}")
        self._lines = lines
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""  # what was read and is not parsed yet begins at `_at`
        self._at = 0
        self._ended = False  # the file, not the list

    def __iter__(self) -> Iterator[SourceItem]:
        """Every value as a text, blank ones included, or as a bad row."""
        opened = ""  # the brackets around what comes next
        expected = _VALUE
        may_close = False
        key: str | None = None
        bad_in_key: int | None = None
        while char := self._next_char():
            bad: int | None = None
            item: SourceItem | None = None
            # 1. A comma or a colon.
            if (char == "," and expected in (_LIST_GOES_ON, _OBJECT_GOES_ON)) or (char == ":" and expected == _COLON):
                self._at += 1
                expected, may_close = _KEY if expected == _OBJECT_GOES_ON else _VALUE, False
                continue
            # 2. The end of a list or an object, which is a value of what is around it.
            if may_close and char == _CLOSING[opened[-1]]:
                self._at += 1
                opened = opened[:-1]
            # 3. A key.
            elif char == '"' and expected == _KEY:
                name, bad = self._string()
                if len(opened) == 1:
                    key, bad_in_key = name if bad is None else excerpt(name), bad
                expected, may_close = _COLON, False
                continue
            # 4. What may not stand here.
            elif expected != _VALUE:
                raise self._broken(expected)
            # 5. The beginning of a list or an object.
            elif char in "[{":
                self._at += 1
                if len(opened) == 1:
                    hint = _OBJECTS if char + opened == "{[" else ""
                    yield self._bad(f"{_KINDS[char]} where a text should be{hint}", key, "…")
                opened += char
                if len(opened) > MAX_DEPTH:
                    raise self._lines.error(f"nested deeper than {MAX_DEPTH}; {_EXPECTED}")
                expected, may_close = _VALUE if char == "[" else _KEY, True
                continue
            # 6. A text.
            elif char == '"':
                text, bad = self._string()
                bad = bad_in_key if bad is None else bad
                if bad is not None:
                    item = self._bad(self._lines.bad_byte_reason(bad), key, excerpt(text))
                else:
                    item = Text(text, key, self._lines.number)
                kind = "a string"
            # 7. A number, true, false or null.
            else:
                word = self._word()
                kind = _WORDS.get(word, "a number")
                item = self._bad(f"{kind} where a text should be", key, excerpt(word))
            if item is not None and len(opened) <= 1:
                if not opened:
                    raise self._lines.error(f"{kind} alone; {_EXPECTED}")
                yield item
            expected = _AFTER[opened[-1:]]
            may_close = bool(opened)
        if opened:
            raise self._lines.error(f"not JSON: the file ends in the middle; {_EXPECTED}")

    def _next_char(self) -> str:
        """The next character that is not blank, which is not taken; nothing at the end of the file."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches anywhere
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def _string(self) -> tuple[str, int | None]:
        """The string that begins here, and the first byte in it that was not UTF-8."""
        while True:
            try:
                value, end = scanstring(self._text, self._at + 1, True)
                break
            except json.JSONDecodeError as error:
                is_torn = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_ESCAPE
                if not is_torn or self._text.endswith("\n") or not self._read_on():
                    said = next((words for beginning, words in _SAID.items() if error.msg.startswith(beginning)), None)
                    raise self._broken(said or "the file ends in the middle") from error
        if len(value) > self._lines.max_bytes:
            raise self._lines.error(self._lines.too_long())
        # A lone half of a surrogate pair may come from an escape; what stands so in the file was a byte.
        bad = None if value.isascii() else find_bad_byte(self._text[self._at : end])
        self._at = end
        return value, bad

    def _word(self) -> str:
        """The number, or one of JSON's three words, that begins here."""
        while (match := _WORD.match(self._text, self._at)) and match.end() == len(self._text) and self._read_on():
            pass
        word = match[0] if match else ""
        if word.lstrip("-").isdigit() and len(word) > _MAX_DIGITS:
            raise self._broken("a number with too many digits")
        if word not in _WORDS and not _NUMBER.fullmatch(word):
            raise self._broken(_VALUE)
        self._at += len(word)
        return word

    def _read_on(self) -> bool:
        """Read the rest of the line, or at least as much as is waiting for its end; False at the end of the file."""
        waiting = self._text[self._at :]
        if len(waiting) > self._lines.max_bytes:
            raise self._lines.error(self._lines.too_long())
        if self._ended:
            return False
        raw = self._lines.piece(max(PIECE_BYTES, len(waiting)))
        self._ended = not raw
        self._text, self._at = waiting + self._decoder.decode(raw, final=self._ended), 0
        return len(self._text) > len(waiting) or not self._ended

    def _broken(self, reason: str) -> SourceError:
        bad = find_bad_byte(self._text[self._at : self._at + 1])
        if bad is not None:
            return self._lines.error(f"not JSON: {self._lines.bad_byte_reason(bad)}")
        return self._lines.error(f"not JSON: {reason}; {_EXPECTED}")

    def _bad(self, reason: str, key: str | None, content: str) -> Rejected:
        return Rejected(reason, key, self._lines.number, content, skipped=True)


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
