"""A chunker for each prompt and task, made in the tokenizer's thread when they are first used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from asyncembed.chunking import ChunkedText, Chunker
from asyncembed.embedder.given_ids import IdChunker
from asyncembed.encoders import (
    Encoder,
    Instruction,
    Tokenized,
    Tokenizer,
    default_chunk_size,
    input_of,
    prompt_of,
    task_of,
)
from asyncembed.errors import ClosedError, OptionsError
from asyncembed.intake import Submission
from asyncembed.options import EmbedOptions

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
