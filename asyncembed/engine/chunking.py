"""Texts into chunks with token ids, none longer than the model takes.

Each text is tokenised once, a whole micro-batch in one call. A text that fits is one chunk and its ids go straight
to the model; only longer ones are split. No token is ever cut in silence: what `long_texts="truncate"` drops is
counted, and what the tokenizer does not know is counted too. Where memory runs out, smaller groups are tried.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from asyncembed.encoders.base import Tokenized, Tokenizer
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.engine.work import Work
from asyncembed.errors import OptionsError
from asyncembed.options import Blanks, LongTexts
from asyncembed.records import Chunk, TokenIds
from asyncembed.wording import plural

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


logger = logging.getLogger("asyncembed")

_DOES_NOT_FIT = "the text does not fit into memory while it is cut into chunks"


def chunk_backing_off(chunk: Callable[[Sequence[Work]], None], works: Sequence[Work]) -> None:
    """`chunk(works)`, which cuts them into chunks.

    Out of memory, they are tried in halves; one that does not fit alone, tried twice, is a failed text.
    """
    if not _fits(chunk, works):
        logger.info("out of memory while tokenising %s; trying smaller groups", plural(len(works), "text"))
        gc.collect()  # once: it takes a tenth of a second where torch is loaded
        _chunk_in_parts(chunk, works)


def _fits(chunk: Callable[[Sequence[Work]], None], works: Sequence[Work]) -> bool:
    """Cuts them into chunks, or, if memory ran out, gives back all that was made of them."""
    try:
        chunk(works)
    except Exception as error:
        if classify(error) is not FailureKind.OUT_OF_MEMORY:
            raise
    else:
        return True
    for work in works:
        work.chunks = ()
    return False


def _chunk_in_parts(chunk: Callable[[Sequence[Work]], None], works: Sequence[Work]) -> None:
    middle = len(works) // 2
    if middle == 0:
        if not _fits(chunk, works):
            works[0].error = _DOES_NOT_FIT
        return
    for part in (works[:middle], works[middle:]):
        if not _fits(chunk, part):
            _chunk_in_parts(chunk, part)


NO_TOKENS = "the text has no tokens"

_PROBE_TEXT = "One sentence, and another one. A line\nand a paragraph\n\n" * 60


class Chunker:
    """Turns texts into chunks. Used by one thread.

    Attributes:
        recorded_size: What the fingerprint calls `chunk_size`: a folder may record more than the model takes.

    Raises:
        OptionsError: The prompt leaves no room for a text, `chunk_size` is more than the model takes, or
            `chunk_overlap` is not smaller than a chunk.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        *,
        prompt: str = "",
        task: str | None = None,
        chunk_size: int | None = None,
        chunk_overlap: int = 0,
        long_texts: LongTexts = "average",
        blanks: Blanks = "error",
        splitter: TextSplitter | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.count = TokenCounter(tokenizer)
        probe, bare = tokenizer.tokenize([prompt + "a", "a"])
        self._n_special = bare.n_prefix + bare.n_suffix
        self._n_prompt = probe.n_content - bare.n_content
        self._n_prompt_unknown = probe.n_unknown - bare.n_unknown
        self.prompt, self.task, self.blanks = prompt, task, blanks
        if long_texts == "truncate" and getattr(tokenizer, "cuts_left", False):
            raise OptionsError(
                "long_texts='truncate' keeps the beginning of a text, and this model's tokenizer keeps the end "
                "(truncation_side='left'); use 'average' or 'error', or load the model with truncation_side='right'"
            )
        room = max_tokens - self._n_special - self._n_prompt
        if room < 1:
            raise OptionsError(
                f"the prompt takes {plural(self._n_prompt, 'token')}, and the model only {max_tokens} in all"
            )
        if chunk_size is not None and chunk_size > room:
            raise OptionsError(
                f"chunk_size={chunk_size} is more than the {plural(room, 'token')} the model takes "
                f"({max_tokens} less {self._n_special} special and {self._n_prompt} of the prompt)"
            )
        self.chunk_size = chunk_size if chunk_size is not None else room
        if chunk_overlap >= self.chunk_size:
            raise OptionsError(
                f"chunk_overlap={chunk_overlap} must be smaller than a chunk of {plural(self.chunk_size, 'token')}"
            )
        self.recorded_size = self.chunk_size
        self.chunk_overlap = chunk_overlap
        self.long_texts = long_texts
        self._splitter = splitter
        self._own_splitter: TextSplitter | None = None
        self._fits = self.chunk_size
        self._ask_always = False
        if splitter is not None:
            counts_tokens = isinstance(getattr(splitter, "_length_function", None), TokenCounter)
            self._ask_always = not counts_tokens
            self._fits = min(self.chunk_size, getattr(splitter, "_chunk_size", self.chunk_size))

    def chunk(self, works: Sequence[Work]) -> None:
        """Cuts a micro-batch of texts into chunks, or says in `error` why one cannot be embedded."""
        tokenized = iter(self._tokenize([str(work.text) for work in works if len(work.text) <= SECTION_CHARS]))
        for work in works:
            work.chunks, work.error, work.n_tokens, work.dropped_tokens, work.unknown_tokens = (), None, 0, 0, 0
            text = str(work.text)
            found = next(tokenized) if len(text) <= SECTION_CHARS else None
            try:
                # 1. too long to be tokenised as a whole   2. refused   3. any other
                if found is None:
                    _refusing(self._chunk_very_long, work, text)
                elif isinstance(found, str):
                    work.error = found
                else:
                    self._chunk_one(work, text, found)
            except UnembeddableError as error:
                work.error = str(error)

    def fingerprint(self) -> dict[str, Any]:
        """What of the chunking changes a vector: settings, and the splitter's class, attributes and its work."""
        found: dict[str, Any] = {
            "chunk_size": self.recorded_size,
            "chunk_overlap": self.chunk_overlap,
            "long_texts": self.long_texts,
        }
        if self._splitter is not None:
            plain = {
                name: value
                for name, value in sorted(vars(self._splitter).items())
                if isinstance(value, (str, int, float, bool, list, tuple, type(None)))
            }
            pieces = self._splitter.split_text(_PROBE_TEXT)
            facts = json.dumps([plain, pieces], sort_keys=True, default=str)
            digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
            found["splitter"] = f"{type(self._splitter).__qualname__} {digest}"
        return found

    def _tokenize(self, texts: list[str]) -> list[Tokenized | str]:
        """Token ids of each text with prompt, or why the tokenizer refused it."""
        try:
            return list(self._tokenize_prompted(texts))
        except MemoryError:
            raise
        except Exception as error:
            if len(texts) > 1:
                return [found for text in texts for found in self._tokenize([text])]
            return [_refusal(texts[0], error)]

    def _tokenize_prompted(self, texts: list[str]) -> list[Tokenized]:
        """Token ids of each text with prompt; of the unknown tokens only the text's own are counted."""
        tokenized = self._tokenizer.tokenize([self.prompt + text for text in texts])
        if not self._n_prompt_unknown:
            return list(tokenized)
        return [found._replace(n_unknown=max(0, found.n_unknown - self._n_prompt_unknown)) for found in tokenized]

    def _chunk_one(self, work: Work, text: str, found: Tokenized) -> None:
        n_tokens = found.n_content - self._n_prompt
        if self._n_prompt and n_tokens <= 0 < self.count(text):
            n_tokens = 1  # the prompt's last letters and the text make one token
        work.unknown_tokens = found.n_unknown
        # 1. blank   2. all unknown   3. a chunk   4. several   5. a chunk, by another measure   6. too long
        if not text.strip() or (n_tokens <= 0 and not found.n_unknown):
            self._chunk_blank(work, text, found)
        elif found.n_unknown >= n_tokens:
            raise _all_unknown(found.n_unknown if n_tokens <= 0 else n_tokens)
        elif n_tokens <= self._fits and not self._ask_always:
            self._one_row(work, text, found.ids, n_tokens)
        elif self.long_texts == "average":
            _refusing(self._split, work, text)
        elif n_tokens <= self.chunk_size:
            self._one_row(work, text, found.ids, n_tokens)
        elif self.long_texts == "error":
            work.unknown_tokens = 0
            raise UnembeddableError(f"the text has {n_tokens} tokens; a chunk takes {self.chunk_size}")
        else:
            work.dropped_tokens = n_tokens - self.chunk_size
            self._one_row(work, text, self._truncated(found), self.chunk_size, is_cut=True)

    def _one_row(self, work: Work, text: str, ids: TokenIds, n_tokens: int, *, is_cut: bool = False) -> None:
        work.chunks = (Chunk(work, 0, text, 0, ids, n_tokens, self.prompt, self.task, is_cut),)
        work.n_tokens = n_tokens

    def _chunk_blank(self, work: Work, text: str, found: Tokenized) -> None:
        work.unknown_tokens = 0
        if self.blanks == "error" or not len(found.ids):
            raise UnembeddableError(NO_TOKENS)
        is_long = found.n_content - self._n_prompt > self.chunk_size  # blanks are tokens to some
        self._one_row(work, text, self._truncated(found) if is_long else found.ids, 0)

    def _chunk_very_long(self, work: Work, text: str) -> None:
        """Chunks a text that is tokenised in sections, never as a whole."""
        n_unknown = self._count_if_unknown(text)
        if n_unknown == 0:
            self._chunk_blank(work, text, self._tokenize_prompted([""])[0])
            return
        if n_unknown is not None:
            work.unknown_tokens = n_unknown
            raise _all_unknown(n_unknown)
        if self.long_texts == "average":
            self._split(work, text)
            return
        counts = [(section, self.count(section)) for section in sections(text)]
        n_tokens = sum(count for _, count in counts)
        if self.long_texts == "error" and n_tokens > self.chunk_size:
            raise UnembeddableError(f"the text has {n_tokens} tokens; a chunk takes {self.chunk_size}")
        head, n_head = head_of(counts, self.chunk_size)
        if self.long_texts == "error" and n_head < n_tokens:
            raise UnembeddableError(f"the text has {len(text)} characters, and only {plural(n_tokens, 'token')}")
        self._chunk_one(work, head, self._tokenize_prompted([head])[0])
        work.dropped_tokens += n_tokens - n_head

    def _count_if_unknown(self, text: str) -> int | None:
        """Tokens of a very long text if all are unknown; None as soon as one is known, which most texts begin with."""
        n_unknown = 0
        for section in sections(text):
            if section.isspace():
                continue
            found = self._tokenizer.tokenize([section])[0]
            if found.n_content > found.n_unknown:
                return None
            n_unknown += found.n_content
        return n_unknown

    def _truncated(self, found: Tokenized) -> TokenIds:
        """The first tokens, the special ones kept at both ends: what the model's own truncation gives."""
        keep = found.n_prefix + self._n_prompt + self.chunk_size
        cut: TokenIds = np.concatenate((found.ids[:keep], found.ids[len(found.ids) - found.n_suffix :]))
        return cut

    def _split(self, work: Work, text: str) -> None:
        chunks: list[Chunk] = []
        at = work.unknown_tokens = 0
        for piece in self._pieces(text):
            start = text.find(piece, at)
            if start < 0:
                start = at  # a splitter may rewrite its pieces
            else:
                at = start + self._unshared(piece)
            for offset, part, found in self._fitting(piece):
                n_tokens = found.n_content - self._n_prompt
                if n_tokens > 0:
                    work.unknown_tokens += found.n_unknown
                    place = (work, len(chunks), part, start + offset)
                    chunks.append(Chunk(*place, found.ids, n_tokens, self.prompt, self.task))
        if not chunks:
            raise UnembeddableError("the splitter left nothing of the text")
        n_tokens = sum(chunk.n_tokens for chunk in chunks)
        if work.unknown_tokens >= n_tokens:
            raise _all_unknown(n_tokens)
        work.chunks, work.n_tokens = tuple(chunks), n_tokens

    def _pieces(self, text: str) -> list[str]:
        splitter = self._splitter
        if splitter is None:
            splitter = self._splitter_of_our_own()
        if self._ask_always:
            return splitter.split_text(text)
        pieces: list[str] = []
        for section in sections(text):
            # One endless word: the splitter would only count it again and again to find nothing to cut at.
            is_word = len(section) > SECTION_CHARS // 2 and len(section.split(None, 1)) == 1
            pieces += [section] if is_word and self.count(section) <= self._fits else splitter.split_text(section)
        return pieces

    def _unshared(self, piece: str) -> int:
        """Leading characters of a piece that the next one cannot begin among."""
        splitter = self._splitter
        overlap = self.chunk_overlap if splitter is None else getattr(splitter, "_chunk_overlap", None)
        if overlap is None or (overlap and self._ask_always):
            return 1  # the splitter counts in units of its own
        spans = self._tokenizer.spans(piece)
        if overlap >= len(spans):
            return 1
        # Without overlap too, characters at the end that make no token are given to both by LangChain's splitters.
        return max(1, spans[-overlap][0] if overlap else spans[-1][1])

    def _splitter_of_our_own(self) -> TextSplitter:
        if self._own_splitter is None:
            self._own_splitter = default_splitter(self.count, self.chunk_size, self.chunk_overlap)
        return self._own_splitter

    def _fitting(self, piece: str) -> list[tuple[int, str, Tokenized]]:
        """The piece, or if it is too long its parts, cut between tokens: offset, part, and its tokens."""
        fitting: list[tuple[int, str, Tokenized]] = []
        waiting = [(0, piece)]
        while waiting:
            offset, part = waiting.pop()
            found = self._tokenize_prompted([part])[0]
            if found.n_content - self._n_prompt <= self.chunk_size:
                fitting.append((offset, part, found))
                continue
            cuts = list(cut_between_tokens(self._tokenizer, part, found.n_content - self._n_prompt, self.chunk_size))
            waiting += [(offset + start, part[start:stop]) for start, stop in reversed(cuts)]
        return fitting


def _refusing(cut: Callable[[Work, str], None], work: Work, text: str) -> None:
    """Cuts a text; what tokenizer or splitter raise is about the text."""
    try:
        cut(work, text)
    except (MemoryError, UnembeddableError):
        raise
    except Exception as error:
        raise UnembeddableError(_refusal(text, error)) from error


def _all_unknown(n_tokens: int) -> UnembeddableError:
    return UnembeddableError(f"the model's vocabulary knows none of the text's {plural(n_tokens, 'token')}")


def _refusal(text: str, error: Exception) -> str:
    """Why tokenizer or splitter refused a text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "the text holds a lone surrogate, which no tokenizer takes"
    return f"the tokenizer refused the text: {type(error).__name__}: {error}"
