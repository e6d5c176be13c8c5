"""Long texts into pieces that a model takes: a LangChain splitter first, then cuts between tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

from asyncembed.encoders.base import Tokenizer

SEPARATORS = ["\n\n", "\n", "。", "！", "？", "।", ". ", " "]
"""Where a long text may be cut, best first. What is still too long then is cut between tokens."""

SECTION_CHARS = 1 << 16
"""A longer text is tokenised and split in sections: a tokenizer keeps some hundred bytes for each character."""

HEAD_SECTIONS = 16
"""Most sections that the head of a truncated text is looked for in: a million characters."""

_MEMO_CHARS = 24
_MEMO_ENTRIES = 1 << 16


class UnembeddableError(Exception):
    """Why a text cannot be embedded, for a person."""


class TextSplitter(Protocol):
    """What is used of a LangChain text splitter."""

    def split_text(self, text: str) -> list[str]:
        """The text in pieces, in order."""
        ...


class TokenCounter:
    """Counts the tokens of a text, without special tokens and prompt: a `length_function` for a splitter."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._memo: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """Tokens of `text`."""
        known = self._memo.get(text)
        if known is not None:
            return known
        n_tokens = self._tokenizer.tokenize([text])[0].n_content
        if len(text) <= _MEMO_CHARS and len(self._memo) < _MEMO_ENTRIES:
            self._memo[text] = n_tokens
        return n_tokens


def default_splitter(count: Callable[[str], int], chunk_size: int, chunk_overlap: int = 0) -> TextSplitter:
    """A `RecursiveCharacterTextSplitter` by paragraphs, lines, sentences and words.

    Its import alone takes most of a second, so it is made at the first long text.
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter: TextSplitter = RecursiveCharacterTextSplitter(
        separators=SEPARATORS,
        keep_separator="end",
        chunk_size=chunk_size,
        chunk_overlap=chunk_overlap,
        length_function=count,
    )
    return splitter


def sections(text: str) -> list[str]:
    """A very long text in parts of some 65,000 characters, cut where a paragraph, line or word ends.

    A word longer than that is cut as well, but its rest is never short: alone it would look like a word that the
    vocabulary may know.
    """
    found, at = [], 0
    while len(text) - at > SECTION_CHARS:
        ends = (text.rfind(mark, at + SECTION_CHARS // 2, at + SECTION_CHARS) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > 0), None)
        stop = end + 1 if end is not None else _end_inside_word(text, at + SECTION_CHARS)
        found.append(text[at:stop])
        at = stop
    if at < len(text) or not found:
        found.append(text[at:])
    return found


def _end_inside_word(text: str, at: int) -> int:
    """Where to cut a word that goes on at `at`: at its end if that is near."""
    farthest = at + SECTION_CHARS // 2
    near = [end + 1 for mark in ("\n", " ") if (end := text.find(mark, at, farthest)) >= 0]
    if near:
        return min(near)
    return len(text) if len(text) <= farthest else at


def head_of(counts: Sequence[tuple[str, int]], chunk_size: int) -> tuple[str, int]:
    """The beginning of a text that has more tokens than a chunk takes, and how many its sections have.

    Sections without tokens, such as megabytes of blanks, stand in it as one blank.
    """
    head: list[str] = []
    n_head = n_sections = 0
    for section, count in counts:
        head.append(section if count else " ")
        n_head, n_sections = n_head + count, n_sections + (count > 0)
        if n_head > chunk_size or n_sections == HEAD_SECTIONS:
            break
    return "".join(head), n_head


def cut_between_tokens(tokenizer: Tokenizer, part: str, n_tokens: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Spans of `part`, which has `n_tokens` and is too long, each of `chunk_size` tokens as tokenised in place.

    Cut out of its place a piece may have some tokens more: it is cut again then, in halves.
    """
    if len(part) < 2:
        raise UnembeddableError(f"one character has {n_tokens} tokens; a chunk takes {chunk_size}")
    starts = [start for start, _ in tokenizer.spans(part)]
    step = chunk_size if len(starts) > chunk_size else max(1, n_tokens // 2)
    inner = sorted({start for start in starts[step::step] if 0 < start < len(part)})
    edges = [0, *(inner or [len(part) // 2]), len(part)]
    return ((start, stop) for start, stop in pairwise(edges) if start < stop)
