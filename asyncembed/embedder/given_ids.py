"""Texts given as token ids into chunks: the ids go to the model as they are."""

from __future__ import annotations

import numpy as np

from asyncembed.chunking import NO_TOKENS, ChunkedText, Chunker
from asyncembed.encoders import IdTokenizer, Tokenizer
from asyncembed.records import Chunk, TokenIds, TokenText
from asyncembed.wording import plural


class IdChunker:
    """Cuts ids into rows of the model, with its special tokens and a prompt around them. Used by one thread.

    Ids that carry the special tokens of a whole row already are taken without them. A row's text, which only models
    that take no ids look at, is what the tokenizer makes of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, chunker: Chunker) -> None:
        self._tokenizer = tokenizer if isinstance(tokenizer, IdTokenizer) else None
        self._chunker = chunker
        bare = tokenizer.tokenize(["a"])[0]
        self._prefix = bare.ids[: bare.n_prefix]
        self._suffix = bare.ids[len(bare.ids) - bare.n_suffix :]
        self._prompt = self._strip(tokenizer.tokenize([chunker.prompt])[0].ids) if chunker.prompt else bare.ids[:0]
        room = max_tokens - len(self._prefix) - len(self._suffix) - len(self._prompt)
        self._size = max(1, min(chunker.chunk_size, room))

    def chunk(self, owner: int, text: TokenText, priority: int) -> ChunkedText:
        """The chunks of a text."""
        tokenizer, given = self._tokenizer, text.ids
        if tokenizer is None:
            return ChunkedText(error="the tokenizer of this model does not say what token ids mean")
        out = (given < 0) | (given >= tokenizer.n_vocabulary)
        if out.any():
            return ChunkedText(
                error=f"token id {given[out][0]} is not in the model's vocabulary of {tokenizer.n_vocabulary}"
            )
        ids = self._strip(given)
        n_unknown = int(np.count_nonzero(ids == tokenizer.unknown_id)) if tokenizer.unknown_id is not None else 0
        if not len(ids):
            return ChunkedText(error=NO_TOKENS)
        if n_unknown == len(ids):
            reason = f"the model's vocabulary knows none of the text's {plural(len(ids), 'token')}"
            return ChunkedText(unknown_tokens=n_unknown, error=reason)
        pieces = self._pieces(ids)
        if pieces is None:
            return ChunkedText(error=f"the text has {len(ids)} tokens; a chunk takes {self._size}")
        chunks = tuple(self._row(tokenizer, (owner, number), piece, priority) for number, piece in enumerate(pieces))
        n_tokens = sum(map(len, pieces))
        return ChunkedText(chunks, n_tokens, max(0, len(ids) - n_tokens), n_unknown)

    def _pieces(self, ids: TokenIds) -> list[TokenIds] | None:
        """What fits into a row each; None if a long text is an error."""
        if len(ids) <= self._size:
            return [ids]
        if self._chunker.long_texts == "error":
            return None
        if self._chunker.long_texts == "truncate":
            return [ids[: self._size]]
        overlap = min(self._chunker.chunk_overlap, self._size - 1)
        starts = range(0, len(ids) - overlap, self._size - overlap)
        return [ids[start : start + self._size] for start in starts]

    def _row(self, tokenizer: IdTokenizer, place: tuple[int, int], piece: TokenIds, priority: int) -> Chunk:
        ids = np.concatenate((self._prefix, self._prompt, piece, self._suffix)).astype(np.int32, copy=False)
        text = tokenizer.decode(piece.tolist())
        return Chunk(*place, text, 0, ids, len(piece), priority, self._chunker.prompt, self._chunker.task)

    def _strip(self, ids: TokenIds) -> TokenIds:
        """Without the special tokens of a whole row, if it has them at both ends."""
        n_prefix, n_suffix = len(self._prefix), len(self._suffix)
        end = len(ids) - n_suffix
        is_whole = n_prefix <= end and (ids[:n_prefix] == self._prefix).all() and (ids[end:] == self._suffix).all()
        return ids[n_prefix:end] if is_whole else ids
