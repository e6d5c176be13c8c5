"""A chunker for each prompt and task, made in the tokenizer's thread when they are first used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

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
from asyncembed.engine.chunking import NO_TOKENS, Chunker, UnembeddableError
from asyncembed.engine.work import Work
from asyncembed.errors import ClosedError, OptionsError
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

    def chunk(self, work: Work) -> None:
        """Cuts a text into chunks, or says in `error` why it cannot be embedded."""
        work.chunks, work.error, work.n_tokens, work.dropped_tokens, work.unknown_tokens = (), None, 0, 0, 0
        try:
            self._chunk(work)
        except UnembeddableError as error:
            work.error = str(error)

    def _chunk(self, work: Work) -> None:
        if not isinstance(work.text, TokenText):
            raise AssertionError("a text of words is another chunker's: this is a bug")
        tokenizer, given = self._tokenizer, work.text.ids
        if tokenizer is None:
            raise UnembeddableError("the tokenizer of this model does not say what token ids mean")
        out = (given < 0) | (given >= tokenizer.n_vocabulary)
        if out.any():
            raise UnembeddableError(
                f"token id {given[out][0]} is not in the model's vocabulary of {tokenizer.n_vocabulary}"
            )
        ids = self._strip(given)
        if not len(ids):
            raise UnembeddableError(NO_TOKENS)
        if tokenizer.unknown_id is not None:
            work.unknown_tokens = int(np.count_nonzero(ids == tokenizer.unknown_id))
        if work.unknown_tokens == len(ids):
            raise UnembeddableError(f"the model's vocabulary knows none of the text's {plural(len(ids), 'token')}")
        pieces = self._pieces(ids)
        work.chunks = tuple(self._row(tokenizer, work, number, piece) for number, piece in enumerate(pieces))
        work.n_tokens = sum(map(len, pieces))
        work.dropped_tokens = max(0, len(ids) - work.n_tokens)

    def _pieces(self, ids: TokenIds) -> list[TokenIds]:
        """What fits into a row each."""
        if len(ids) <= self._size:
            return [ids]
        if self._chunker.long_texts == "error":
            raise UnembeddableError(f"the text has {len(ids)} tokens; a chunk takes {self._size}")
        if self._chunker.long_texts == "truncate":
            return [ids[: self._size]]
        overlap = min(self._chunker.chunk_overlap, self._size - 1)
        starts = range(0, len(ids) - overlap, self._size - overlap)
        return [ids[start : start + self._size] for start in starts]

    def _row(self, tokenizer: IdTokenizer, work: Work, ordinal: int, piece: TokenIds) -> Chunk:
        ids = np.concatenate((self._prefix, self._prompt, piece, self._suffix)).astype(np.int32, copy=False)
        text = tokenizer.decode(piece.tolist())
        return Chunk(work, ordinal, text, 0, ids, len(piece), self._chunker.prompt, self._chunker.task)

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

    def __call__(self, works: Sequence[Work]) -> None:
        """Cuts the texts into chunks. An instruction that leaves no room fails its texts."""
        groups: dict[Instruction, list[Work]] = {}
        for work in works:
            groups.setdefault(work.instruction, []).append(work)
        for instruction, group in groups.items():
            self._chunk(instruction, group)

    def _chunk(self, instruction: Instruction, works: Sequence[Work]) -> None:
        try:
            chunker = self._chunker(instruction)
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, OptionsError) else f"the tokenizer refused the prompt: {error}"
            for work in works:
                work.error = reason
            return
        if texts := [work for work in works if isinstance(work.text, str)]:
            chunker.chunk(texts)
        if given := [work for work in works if not isinstance(work.text, str)]:
            rows = IdChunker(*self._input(instruction.task), chunker)
            for work in given:
                rows.chunk(work)

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
        self._work: Work | None = None

    def __call__(self, works: Sequence[Work]) -> None:
        """Cuts the texts into chunks; one that is given up gets no more than an error, which nobody is told."""
        if self._chunkers is None:
            self._chunkers = InstructionChunkers(self._encoder, self._options, lambda it: _Abandonable(it, self))
        for work in works:
            self._work = work
            self._chunkers([work])
        self._work = None

    def check(self) -> None:
        """Gives up a text that nobody waits for any more."""
        if self._work is not None and not self._work.is_wanted:
            raise ClosedError("nobody waits for this text any more")


class _Abandonable:
    """A tokenizer that refuses to go on when nobody waits for what it does."""

    def __init__(self, tokenizer: Tokenizer, chunkers: LongTextChunkers) -> None:
        self._tokenizer = tokenizer
        self._chunkers = chunkers

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        self._chunkers.check()
        return self._tokenizer.tokenize(texts)

    def spans(self, text: str) -> list[tuple[int, int]]:
        self._chunkers.check()
        return self._tokenizer.spans(text)
