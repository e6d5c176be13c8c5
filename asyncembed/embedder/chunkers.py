"""A chunker for each prompt, made in the tokenizer's thread when the prompt is first used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from asyncembed.chunking import ChunkedText, Chunker
from asyncembed.embedder.given_ids import IdChunker
from asyncembed.encoders import Encoder, Tokenizer
from asyncembed.errors import OptionsError
from asyncembed.lane import Submission
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
                chunk_size=self._options.chunk_size,
                chunk_overlap=self._options.chunk_overlap,
                long_texts=self._options.long_texts,
            )
            self._chunkers[prompt] = chunker
            if len(self._chunkers) > KEPT_CHUNKERS:
                self._chunkers.popitem(last=False)
        self._chunkers.move_to_end(prompt)
        return chunker
