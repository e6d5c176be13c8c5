"""Tokenizers of the `tokenizers` library, and of transformers where there is no fast one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import Unigram

from asyncembed.encoders.base import Tokenized
from asyncembed.records import TokenIds

FEW_TEXTS = 16
"""So many texts are tokenised one by one: a call of several wakes the library's own threads, which takes half as long
again of the processor's time, and these then compete with the model's for a while."""


_BLANK = "▁"
"""How SentencePiece writes the blank before a word; a token of its own before one that it does not know."""


class FastTokenizer:
    """A private copy of a fast tokenizer, with truncation and padding off."""

    def __init__(
        self,
        tokenizer: RustTokenizer,
        unknown: str | None,
        *,
        cuts_left: bool = False,
        with_special_tokens: bool = True,
    ) -> None:
        self.cuts_left = cuts_left
        self._with_special = with_special_tokens
        self._tokenizer = RustTokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.unknown_id = self._tokenizer.token_to_id(unknown) if unknown is not None else None
        self._blank_id = self._tokenizer.token_to_id(_BLANK)
        self.n_vocabulary: int = self._tokenizer.get_vocab_size()
        self._n_special = self._tokenizer.num_special_tokens_to_add(False)
        self._affixes = self._find_affixes()

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """Token ids of each text, in order."""
        calls = [[text] for text in texts] if len(texts) <= FEW_TEXTS else [list(texts)]
        encode, special = self._tokenizer.encode_batch_fast, self._with_special
        return [self._tokenized(encoding) for call in calls for encoding in encode(call, add_special_tokens=special)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and stop of each content token of `text`, in characters."""
        spans: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text that these ids stand for, special tokens left out."""
        return str(self._tokenizer.decode(list(ids)))

    def _tokenized(self, encoding: Encoding) -> Tokenized:
        listed = encoding.ids
        ids = np.array(listed, np.int32)
        if self.unknown_id is None or self.unknown_id not in listed:  # most texts
            return Tokenized(ids, *self._affixes, 0)
        return _tokenized(ids, *self._affixes, self.unknown_id, self._blank_id)

    def _find_affixes(self) -> tuple[int, int]:
        """Special tokens before and after the content: the same for every single text."""
        if not self._with_special:
            return 0, 0
        mask = self._tokenizer.encode("a").special_tokens_mask
        prefix = next((i for i, special in enumerate(mask) if not special), self._n_special)
        return min(prefix, self._n_special), max(0, self._n_special - prefix)


class SlowTokenizer:
    """A tokenizer that is Python all the way: called through transformers, text by text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self.cuts_left = cuts_left(tokenizer)
        self.unknown_id: int | None = tokenizer.unk_token_id
        self._blank_id = tokenizer.get_vocab().get(_BLANK)
        self.n_vocabulary = len(tokenizer)

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """All texts in one call."""
        return [self._tokenized(text) for text in texts]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and stop of each content token, found by decoding ever longer beginnings of `text`."""
        pieces = self._tokenizer.tokenize(text)
        spans, at = [], 0
        for number, piece in enumerate(pieces):
            bare = piece.replace("▁", " ").removeprefix("##").strip()
            found = text.find(bare, at) if bare else at
            start = found if found >= 0 else at
            at = len(text) if number == len(pieces) - 1 else start + len(bare)
            spans.append((start, at))
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text that these ids stand for, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tokenized(self, text: str) -> Tokenized:
        found = self._tokenizer(text, return_special_tokens_mask=True, truncation=False, verbose=False)
        ids, mask = np.array(found["input_ids"], np.int32), found["special_tokens_mask"]
        n_special = sum(mask)
        prefix = next((i for i, special in enumerate(mask) if not special), n_special)
        n_prefix = min(prefix, n_special)
        return _tokenized(ids, n_prefix, n_special - n_prefix, self.unknown_id, self._blank_id)


class WordTokenizer:
    """A tokenizer of sentence-transformers that knows whole words, drops all others, and adds no special tokens."""

    unknown_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._words = list(tokenizer.get_vocab())
        self.n_vocabulary = len(self._words)

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """All texts in one call. The words of a text without a known one count as its unknown tokens."""
        found = [(text, np.array(self._tokenizer.tokenize(text), np.int32)) for text in texts]
        return [Tokenized(ids, 0, 0, 0 if len(ids) else len(text.split())) for text, ids in found]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and stop of each known word."""
        words = re.finditer(r"\S+", text)
        return [word.span() for word in words for _ in self._tokenizer.tokenize(word.group())]

    def decode(self, ids: Sequence[int]) -> str:
        """The words that these ids stand for."""
        return " ".join(self._words[number] for number in ids)


def cuts_left(tokenizer: Any) -> bool:
    """Whether a tokenizer of either library truncates long texts on the left."""
    bare = getattr(tokenizer, "backend_tokenizer", tokenizer)
    truncation = bare.truncation if isinstance(bare, RustTokenizer) else None
    side = getattr(tokenizer, "truncation_side", None) or (truncation or {}).get("direction", "right")
    return str(side).lower() == "left"


def unknown_of(tokenizer: Any) -> str | None:
    """The unknown token of a tokenizer of either library; None if its vocabulary has none."""
    named: str | None = getattr(tokenizer, "unk_token", None)
    bare = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if named is not None or not isinstance(bare, RustTokenizer):
        return named
    if not isinstance(bare.model, Unigram):
        return getattr(bare.model, "unk_token", None)
    facts = json.loads(bare.to_str())["model"]  # nothing else tells it
    return None if facts["unk_id"] is None else str(facts["vocab"][facts["unk_id"]][0])


def _tokenized(ids: TokenIds, n_prefix: int, n_suffix: int, unknown_id: int | None, blank_id: int | None) -> Tokenized:
    """With the unknown tokens counted: the content's only, since some vocabularies end each text with that token."""
    content = ids[n_prefix : len(ids) - n_suffix]
    unknown = content == unknown_id if unknown_id is not None else np.zeros(len(content), bool)
    n_unknown = int(np.count_nonzero(unknown))
    if 0 < n_unknown < len(content) and (unknown | (content == blank_id)).all():
        n_unknown = len(content)  # the mark before an unknown word says nothing of it
    return Tokenized(ids, n_prefix, n_suffix, n_unknown)
