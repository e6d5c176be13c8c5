"""A chunker for each prompt, made in the tokenizer's thread when the prompt is first used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from asyncembed.chunking import ChunkedText, Chunker
from asyncembed.embedder.given_ids import IdChunker
from asyncembed.encoders import Encoder, Tokenized, Tokenizer, default_chunk_size
from asyncembed.errors import ClosedError, OptionsError
from asyncembed.intake import Submission
from asyncembed.options import EmbedOptions

KEPT_CHUNKERS = 32
"""Chunkers kept: one is made in a fraction of a millisecond, but counts tokens from memory only when it is kept."""


class PromptChunkers:
    """Turns texts with prompts of their own into chunks. Used by one thread.

    Args:
        encoder: The model.
        options: `chunk_size`, `chunk_overlap` and `long_texts` are read.
        tokenizer: A tokenizer that only that thread uses.
    """

    def __init__(self, encoder: Encoder, options: EmbedOptions, tokenizer: Tokenizer) -> None:
        self._encoder = encoder
        self._options = options
        self._tokenizer = tokenizer
        self._chunkers: OrderedDict[str, Chunker] = OrderedDict()
        self.chunk_size = self._chunker(encoder.prompt).chunk_size

    def __call__(self, submissions: Sequence[Submission]) -> list[ChunkedText]:
        """Chunks of the texts: one result each, in order. A prompt that leaves no room fails its texts."""
        if len({item.prompt for item in submissions}) == 1:
            return self._chunk(submissions[0].prompt, submissions)
        groups: dict[str, list[int]] = {}
        for position, item in enumerate(submissions):
            groups.setdefault(item.prompt, []).append(position)
        results: list[ChunkedText] = [ChunkedText()] * len(submissions)
        for prompt, positions in groups.items():
            found = self._chunk(prompt, [submissions[position] for position in positions])
            for position, result in zip(positions, found, strict=True):
                results[position] = result
        return results

    def _chunk(self, prompt: str, submissions: Sequence[Submission]) -> list[ChunkedText]:
        try:
            chunker = self._chunker(prompt)
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, OptionsError) else f"the tokenizer refused the prompt: {error}"
            return [ChunkedText(error=reason)] * len(submissions)
        texts = [(item.owner, item.text, item.priority) for item in submissions if isinstance(item.text, str)]
        found = iter(chunker.chunk(texts) if texts else [])
        if len(texts) == len(submissions):
            return list(found)
        rows = IdChunker(self._tokenizer, self._encoder.max_tokens, chunker)
        return [
            next(found) if isinstance(item.text, str) else rows.chunk(item.owner, item.text, item.priority)
            for item in submissions
        ]

    def _chunker(self, prompt: str) -> Chunker:
        chunker = self._chunkers.get(prompt)
        if chunker is None:
            chunker = Chunker(
                self._tokenizer,
                self._encoder.max_tokens,
                prompt=prompt,
                chunk_size=self._options.chunk_size or default_chunk_size(self._encoder),
                chunk_overlap=self._options.chunk_overlap,
                long_texts=self._options.long_texts,
            )
            self._chunkers[prompt] = chunker
            if len(self._chunkers) > KEPT_CHUNKERS:
                self._chunkers.popitem(last=False)
        self._chunkers.move_to_end(prompt)
        return chunker


class LongTextChunkers:
    """Turns one long text at a time into chunks, with a tokenizer of its own; gives up when nobody waits for it.

    Used by one thread. A text is looked at in sections of some 65,000 characters: between two of these it gives up.
    """

    def __init__(self, encoder: Encoder, options: EmbedOptions) -> None:
        self._encoder = encoder
        self._options = options
        self._chunkers: PromptChunkers | None = None
        self._tokenizer: _Abandonable | None = None

    def __call__(self, item: Submission, is_wanted: Callable[[], bool]) -> ChunkedText:
        """Chunks of the text; of one that is given up no more than an error, which nobody is told."""
        if self._chunkers is None or self._tokenizer is None:
            self._tokenizer = _Abandonable(self._encoder.tokenizer())
            self._chunkers = PromptChunkers(self._encoder, self._options, self._tokenizer)
        self._tokenizer.is_wanted = is_wanted
        try:
            return self._chunkers([item])[0]
        finally:
            self._tokenizer.is_wanted = _always


class _Abandonable:
    """A tokenizer that refuses to go on when nobody waits for what it does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_wanted: Callable[[], bool] = _always

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        self._check()
        return self._tokenizer.tokenize(texts)

    def spans(self, text: str) -> list[tuple[int, int]]:
        self._check()
        return self._tokenizer.spans(text)

    def _check(self) -> None:
        if not self.is_wanted():
            raise ClosedError("nobody waits for this text any more")


def _always() -> bool:
    return True
