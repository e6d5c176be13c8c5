"""Tokenizers of the `tokenizers` library, and of transformers where there is no fast one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.base import Tokenized

FEW_TEXTS = 16
"""So many texts are tokenised one by one: a call of several wakes the library's own threads, which takes half as long
again of the processor's time, and these then compete with the model's for a while."""


class FastTokenizer:
    """A private copy of a fast tokenizer, with truncation and padding off.

    Args:
        tokenizer: The tokenizer to copy.
        unknown: The unknown token; None if the vocabulary has none.
    """

    def __init__(self, tokenizer: RustTokenizer, unknown: str | None) -> None:
        self._tokenizer = RustTokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.unknown_id = self._tokenizer.token_to_id(unknown) if unknown is not None else None
        self.n_vocabulary: int = self._tokenizer.get_vocab_size()
        self._n_special = self._tokenizer.num_special_tokens_to_add(False)
        self._affixes = self._find_affixes()

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """Token ids of each text, in order."""
        calls = [[text] for text in texts] if len(texts) <= FEW_TEXTS else [list(texts)]
        return [self._tokenized(encoding) for call in calls for encoding in self._tokenizer.encode_batch_fast(call)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and stop of each content token of `text`, in characters."""
        spans: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text that these ids stand for, special tokens left out."""
        return str(self._tokenizer.decode(list(ids)))

    def _tokenized(self, encoding: Encoding) -> Tokenized:
        ids = np.array(encoding.ids, dtype=np.int32)
        unknown = int(np.count_nonzero(ids == self.unknown_id)) if self.unknown_id is not None else 0
        return Tokenized(ids, *self._affixes, unknown)

    def _find_affixes(self) -> tuple[int, int]:
        """Special tokens before and after the content: the same for every single text."""
        mask = self._tokenizer.encode("a").special_tokens_mask
        prefix = next((i for i, special in enumerate(mask) if not special), self._n_special)
        return min(prefix, self._n_special), max(0, self._n_special - prefix)


class SlowTokenizer:
    """A tokenizer that is Python all the way: called through transformers, text by text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self.unknown_id: int | None = tokenizer.unk_token_id
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
        unknown = int(np.count_nonzero(ids == self.unknown_id)) if self.unknown_id is not None else 0
        return Tokenized(ids, min(prefix, n_special), n_special - min(prefix, n_special), unknown)
