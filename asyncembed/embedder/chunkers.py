"""A chunker for each prompt and task, made in the tokenizer's thread when they are first used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from asyncembed.chunking import NO_TOKENS, ChunkedText, Chunker
from asyncembed.encoders import (
    Encoder,
    IdTokenizer,
    Instruction,
    Tokenized,
    Tokenizer,
    default_chunk_size,
    input_of,
    prompt_of,
    task_of,
)
from asyncembed.errors import ClosedError, OptionsError
from asyncembed.lane import Submission
from asyncembed.options import EmbedOptions
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


KEPT_CHUNKERS = 32
"""Chunkers kept: one is made in a fraction of a millisecond, but counts tokens from memory only when it is kept."""


class InstructionChunkers:
    """Turns texts with instructions of their own into chunks. Used by one thread."""

    def __init__(
        self, encoder: Encoder, options: EmbedOptions, wrap: Callable[[Tokenizer], Tokenizer] | None = None
    ) -> None:
        self._encoder = encoder
        self._options = options
        self._wrap = wrap
        self._inputs: dict[str | None, tuple[Tokenizer, int]] = {}
        self._chunkers: OrderedDict[Instruction, Chunker] = OrderedDict()
        prompt = prompt_of(encoder, options.prompt, options.prompt_name)
        task = getattr(encoder, "first_task", None) if options.task is None else task_of(encoder, options.task)
        self.chunk_size = self._chunker(Instruction(prompt, task)).chunk_size

    def __call__(self, submissions: Sequence[Submission]) -> list[ChunkedText]:
        """Chunks of the texts: one result each, in order. An instruction that leaves no room fails its texts."""
        if len({item.instruction for item in submissions}) == 1:
            return self._chunk(submissions[0].instruction, submissions)
        groups: dict[Instruction, list[int]] = {}
        for position, item in enumerate(submissions):
            groups.setdefault(item.instruction, []).append(position)
        results: list[ChunkedText] = [ChunkedText()] * len(submissions)
        for instruction, positions in groups.items():
            found = self._chunk(instruction, [submissions[position] for position in positions])
            for position, result in zip(positions, found, strict=True):
                results[position] = result
        return results

    def _chunk(self, instruction: Instruction, submissions: Sequence[Submission]) -> list[ChunkedText]:
        try:
            chunker = self._chunker(instruction)
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, OptionsError) else f"the tokenizer refused the prompt: {error}"
            return [ChunkedText(error=reason)] * len(submissions)
        texts = [(item.owner, item.text, item.priority) for item in submissions if isinstance(item.text, str)]
        found = iter(chunker.chunk(texts) if texts else [])
        if len(texts) == len(submissions):
            return list(found)
        rows = IdChunker(*self._input(instruction.task), chunker)
        return [
            next(found) if isinstance(item.text, str) else rows.chunk(item.owner, item.text, item.priority)
            for item in submissions
        ]

    def _input(self, task: str | None) -> tuple[Tokenizer, int]:
        """Tokenizer and longest row of a task."""
        if task not in self._inputs:
            tokenizer, max_tokens = input_of(self._encoder, task)
            self._inputs[task] = (self._wrap(tokenizer) if self._wrap is not None else tokenizer, max_tokens)
        return self._inputs[task]

    def _chunker(self, instruction: Instruction) -> Chunker:
        chunker = self._chunkers.get(instruction)
        if chunker is None:
            tokenizer, max_tokens = self._input(instruction.task)
            chunker = Chunker(
                tokenizer,
                max_tokens,
                prompt=instruction.prompt,
                task=instruction.task,
                chunk_size=self._options.chunk_size or default_chunk_size(self._encoder, max_tokens),
                chunk_overlap=self._options.chunk_overlap,
                long_texts=self._options.long_texts,
                blanks=instruction.blanks,
            )
            self._chunkers[instruction] = chunker
            if len(self._chunkers) > KEPT_CHUNKERS:
                self._chunkers.popitem(last=False)
        self._chunkers.move_to_end(instruction)
        return chunker


class LongTextChunkers:
    """Turns one long text at a time into chunks, with a tokenizer of its own; gives up when nobody waits for it.

    Used by one thread. A text is looked at in sections of some 65,000 characters: between two of these it gives up.
    """

    def __init__(self, encoder: Encoder, options: EmbedOptions) -> None:
        self._encoder = encoder
        self._options = options
        self._chunkers: InstructionChunkers | None = None
        self._is_wanted: Callable[[], bool] = _always

    def __call__(self, item: Submission, is_wanted: Callable[[], bool]) -> ChunkedText:
        """Chunks of the text; of one that is given up no more than an error, which nobody is told."""
        if self._chunkers is None:
            self._chunkers = InstructionChunkers(self._encoder, self._options, self._abandonable)
        self._is_wanted = is_wanted
        try:
            return self._chunkers([item])[0]
        finally:
            self._is_wanted = _always

    def _abandonable(self, tokenizer: Tokenizer) -> Tokenizer:
        return _Abandonable(tokenizer, lambda: self._is_wanted())


class _Abandonable:
    """A tokenizer that refuses to go on when nobody waits for what it does."""

    def __init__(self, tokenizer: Tokenizer, is_wanted: Callable[[], bool]) -> None:
        self._tokenizer = tokenizer
        self._is_wanted = is_wanted

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        self._check()
        return self._tokenizer.tokenize(texts)

    def spans(self, text: str) -> list[tuple[int, int]]:
        self._check()
        return self._tokenizer.spans(text)

    def _check(self) -> None:
        if not self._is_wanted():
            raise ClosedError("nobody waits for this text any more")


def _always() -> bool:
    return True
