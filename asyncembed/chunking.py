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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from asyncembed.encoders.base import Tokenized, Tokenizer
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.errors import OptionsError
from asyncembed.options import Blanks, LongTexts
from asyncembed.records import Chunk
from asyncembed.splitting import (
    SECTION_CHARS,
    TextSplitter,
    TokenCounter,
    UncuttableError,
    cut_between_tokens,
    default_splitter,
    head_of,
    sections,
)
from asyncembed.wording import plural

logger = logging.getLogger("asyncembed")

T = TypeVar("T")

_DOES_NOT_FIT = "the text does not fit into memory while it is cut into chunks"


def chunk_backing_off(
    chunk: Callable[[Sequence[T]], Sequence[ChunkedText]], texts: Sequence[T]
) -> Sequence[ChunkedText]:
    """`chunk(texts)`: one result each, in order.

    Out of memory, the texts are tried in halves; one that does not fit alone, tried twice, is a failed text.
    """
    found = _try(chunk, texts)
    if found is not None:
        return found
    logger.info("out of memory while tokenising %s; trying smaller groups", plural(len(texts), "text"))
    gc.collect()  # once: it takes a tenth of a second where torch is loaded
    return _in_parts(chunk, texts)


def _try(chunk: Callable[[Sequence[T]], Sequence[ChunkedText]], texts: Sequence[T]) -> Sequence[ChunkedText] | None:
    """The chunks, or None if memory ran out: by then all that was made of the texts is given back."""
    try:
        return chunk(texts)
    except Exception as error:
        if classify(error) is not FailureKind.OUT_OF_MEMORY:
            raise
    return None


def _in_parts(chunk: Callable[[Sequence[T]], Sequence[ChunkedText]], texts: Sequence[T]) -> Sequence[ChunkedText]:
    middle = len(texts) // 2
    if middle == 0:
        return _try(chunk, texts) or [ChunkedText(error=_DOES_NOT_FIT)]
    results: list[ChunkedText] = []
    for part in (texts[:middle], texts[middle:]):
        results += _try(chunk, part) or _in_parts(chunk, part)
    return results


__all__ = ["ChunkedText", "Chunker", "TokenCounter"]

NO_TOKENS = "the text has no tokens"

_PROBE_TEXT = "One sentence, and another one. A line\nand a paragraph\n\n" * 60


@dataclass(frozen=True, slots=True)
class ChunkedText:
    """What became of a text.

    Attributes:
        chunks: In order; empty if `error` is set.
        n_tokens: Tokens of the chunks, without special tokens and prompt.
        dropped_tokens: Tokens cut off by `long_texts="truncate"`.
        unknown_tokens: Tokens that the model's vocabulary does not know.
        error: Why the text cannot be embedded; None if it can.
    """

    chunks: tuple[Chunk, ...] = ()
    n_tokens: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    error: str | None = None


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

    def chunk(self, texts: Sequence[tuple[int, str, int]]) -> list[ChunkedText]:
        """Chunks of a micro-batch of texts, given as (owner, text, priority): one result each, in order."""
        tokenized = iter(self._tokenize([text for _, text, _ in texts if len(text) <= SECTION_CHARS]))
        results: list[ChunkedText] = []
        for owner, text, priority in texts:
            found = next(tokenized) if len(text) <= SECTION_CHARS else None
            if found is None:
                results.append(self._chunk_very_long(owner, text, priority))
            elif isinstance(found, str):
                results.append(ChunkedText(error=found))
            else:
                results.append(self._chunk_one(owner, text, priority, found))
        return results

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

    def _chunk_one(self, owner: int, text: str, priority: int, found: Tokenized) -> ChunkedText:
        n_tokens = found.n_content - self._n_prompt
        if self._n_prompt and n_tokens <= 0 < self.count(text):
            n_tokens = 1  # the prompt's last letters and the text make one token
        if not text.strip() or (n_tokens <= 0 and not found.n_unknown):
            return self._chunk_blank(owner, text, priority, found)
        if found.n_unknown >= n_tokens:
            return _all_unknown(found.n_unknown, n_tokens if n_tokens > 0 else None)
        if n_tokens <= self._fits and not self._ask_always:
            chunk = Chunk(owner, 0, text, 0, found.ids, n_tokens, priority, self.prompt, self.task)
            return ChunkedText((chunk,), n_tokens, unknown_tokens=found.n_unknown)
        if self.long_texts == "average":
            return self._split(owner, text, priority)
        if n_tokens <= self.chunk_size:
            chunk = Chunk(owner, 0, text, 0, found.ids, n_tokens, priority, self.prompt, self.task)
            return ChunkedText((chunk,), n_tokens, unknown_tokens=found.n_unknown)
        if self.long_texts == "error":
            return ChunkedText(error=f"the text has {n_tokens} tokens; a chunk takes {self.chunk_size}")
        return self._truncate(owner, text, priority, found)

    def _chunk_blank(self, owner: int, text: str, priority: int, found: Tokenized) -> ChunkedText:
        if self.blanks == "error" or not len(found.ids):
            return ChunkedText(error=NO_TOKENS)
        if found.n_content - self._n_prompt > self.chunk_size:  # blanks are tokens to some
            found = found._replace(ids=self._truncate(owner, text, priority, found).chunks[0].ids)
        return ChunkedText((Chunk(owner, 0, text, 0, found.ids, 0, priority, self.prompt, self.task),))

    def _chunk_very_long(self, owner: int, text: str, priority: int) -> ChunkedText:
        """A text that is tokenised in sections, never as a whole."""
        try:
            n_unknown = self._count_if_unknown(text)
            if n_unknown == 0:
                return self._chunk_blank(owner, text, priority, self._tokenize_prompted([""])[0])
            if n_unknown is not None:
                return _all_unknown(n_unknown)
            if self.long_texts == "average":
                return self._split(owner, text, priority)
            counts = [(section, self.count(section)) for section in sections(text)]
            n_tokens = sum(count for _, count in counts)
            if self.long_texts == "error" and n_tokens > self.chunk_size:
                return ChunkedText(error=f"the text has {n_tokens} tokens; a chunk takes {self.chunk_size}")
            head, n_head = head_of(counts, self.chunk_size)
            if self.long_texts == "error" and n_head < n_tokens:
                return ChunkedText(error=f"the text has {len(text)} characters, and only {plural(n_tokens, 'token')}")
            found = self._tokenize_prompted([head])[0]
        except MemoryError:
            raise
        except Exception as error:
            return ChunkedText(error=_refusal(text, error))
        chunked = self._chunk_one(owner, head, priority, found)
        return replace(chunked, dropped_tokens=chunked.dropped_tokens + n_tokens - n_head)

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

    def _truncate(self, owner: int, text: str, priority: int, found: Tokenized) -> ChunkedText:
        """The first tokens, the special ones kept at both ends: what the model's own truncation gives."""
        keep = found.n_prefix + self._n_prompt + self.chunk_size
        suffix = found.ids[len(found.ids) - found.n_suffix :]
        ids = np.concatenate((found.ids[:keep], suffix))
        dropped = found.n_content - self._n_prompt - self.chunk_size
        chunk = Chunk(owner, 0, text, 0, ids, self.chunk_size, priority, self.prompt, self.task, is_cut=True)
        return ChunkedText((chunk,), self.chunk_size, dropped, found.n_unknown)

    def _split(self, owner: int, text: str, priority: int) -> ChunkedText:
        try:
            return self._split_into_chunks(owner, text, priority)
        except MemoryError:
            raise
        except UncuttableError as error:
            return ChunkedText(error=str(error))
        except Exception as error:
            return ChunkedText(error=_refusal(text, error))

    def _split_into_chunks(self, owner: int, text: str, priority: int) -> ChunkedText:
        chunks: list[Chunk] = []
        at, unknown = 0, 0
        for piece in self._pieces(text):
            start = text.find(piece, at)
            if start < 0:
                start = at  # a splitter may rewrite its pieces
            else:
                at = start + self._unshared(piece)
            for offset, part, found in self._fitting(piece):
                n_tokens = found.n_content - self._n_prompt
                if n_tokens > 0:
                    unknown += found.n_unknown
                    place = (owner, len(chunks), part, start + offset)
                    chunks.append(Chunk(*place, found.ids, n_tokens, priority, self.prompt, self.task))
        n_tokens = sum(chunk.n_tokens for chunk in chunks)
        if not chunks:
            return ChunkedText(error="the splitter left nothing of the text")
        if unknown >= n_tokens:
            return _all_unknown(unknown, n_tokens)
        return ChunkedText(tuple(chunks), n_tokens, unknown_tokens=unknown)

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


def _all_unknown(n_unknown: int, n_tokens: int | None = None) -> ChunkedText:
    n_tokens = n_unknown if n_tokens is None else n_tokens
    return ChunkedText(
        unknown_tokens=n_unknown, error=f"the model's vocabulary knows none of the text's {plural(n_tokens, 'token')}"
    )


def _refusal(text: str, error: Exception) -> str:
    """Why tokenizer or splitter refused a text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "the text holds a lone surrogate, which no tokenizer takes"
    return f"the tokenizer refused the text: {type(error).__name__}: {error}"
