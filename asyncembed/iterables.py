"""What a caller gives as many texts: refused where iterating it gives something else, lines without their ends."""

from __future__ import annotations

import io
import os
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from asyncembed.errors import OptionsError
from asyncembed.wording import kind_of

_LINE_END = re.compile(r"(?:\r\n|\n|\r)\Z")
_MAX_NAMES = 10


def check_source(source: object) -> None:
    """Refuse what cannot be a source of texts.

    Raises:
        OptionsError: It is a single `str` or `bytes`, a path, a mapping, a table, a binary file, or no iterable.
    """
    if isinstance(source, (str, bytes, bytearray, memoryview, os.PathLike)):
        raise OptionsError(
            f"{kind_of(source)} is one text, not an iterable of texts; pass [text], or read_texts(path) for a file"
        )
    if isinstance(source, Mapping):
        raise OptionsError(
            f"{kind_of(source)} gives its keys, not its texts; pass its values(), or Text(text, key=key) for each item"
        )
    if (reason := why_other_items(source)) is not None:
        raise OptionsError(reason)
    if not any(hasattr(source, method) for method in ("__aiter__", "__iter__", "__getitem__")):
        raise OptionsError(f"{kind_of(source)} is no iterable of texts; pass a list, a generator, …")


def why_other_items(source: object) -> str | None:
    """Why iterating something gives other things than its texts, and what to pass instead; None if it may give them.

    A table is known by its interface, whatever library it is of: iterated, many give the names of their columns, which
    are `str` as texts are.
    """
    if isinstance(source, (io.RawIOBase, io.BufferedIOBase)):
        return f"{kind_of(source)} is a binary file and gives bytes; pass read_texts(file), or open it as text"
    for attribute in ("column_names", "columns"):
        names = getattr(source, attribute, None)
        if isinstance(names, Iterable) and not isinstance(names, str):
            listed = list(map(str, names))[:_MAX_NAMES]
            column = f"[{listed[-1]!r}]" if listed else "['text']"
            column += ".to_pylist()" if hasattr(source, "to_pylist") else ""
            there_are = f"; it has {', '.join(map(repr, listed))}" if listed else ""
            return f"{kind_of(source)} is a table, not texts: pass one of its columns, as in table{column}{there_are}"
    return None


def without_line_ends(source: Any) -> Any:
    """The source; of one that is read by lines, such as an open text file, the lines as `read_texts` gives them."""
    if not hasattr(source, "readline"):
        return source
    return _lines_soon(source) if isinstance(source, AsyncIterable) else _lines(source)


def _lines(source: Iterable[Any]) -> Iterator[Any]:
    is_first = True
    for line in source:
        yield _line(line, is_first)
        is_first = False


async def _lines_soon(source: AsyncIterable[Any]) -> AsyncIterator[Any]:
    is_first = True
    async for line in source:
        yield _line(line, is_first)
        is_first = False


def _line(line: Any, is_first: bool) -> Any:
    if not isinstance(line, str):
        return line  # whoever embeds it says that it is no text
    return _LINE_END.sub("", line.removeprefix("\ufeff") if is_first else line)
