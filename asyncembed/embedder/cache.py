"""Vectors of texts asked for lately, bounded in bytes: pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from asyncembed.encoders import Instruction
from asyncembed.records import AnyText, FloatVector

ENTRY_OVERHEAD = 400
"""Python objects of one entry besides text and vector, in bytes."""

Key = tuple[Instruction, AnyText]
"""What the model is told, and the text."""


class Answer(NamedTuple):
    """What is known of a text.

    Attributes:
        embedding: Shape `(dim,)` float32; None if `error` is set.
        n_tokens: Its tokens without prompt and special tokens.
        error: Why it cannot be embedded.
    """

    embedding: FloatVector | None
    n_tokens: int = 0
    error: str | None = None


class AnswerCache:
    """The answers used last, by instruction and text."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.n_hits = 0
        self._answers: OrderedDict[Key, Answer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def __repr__(self) -> str:
        return f"<AnswerCache texts={len(self)} {self.n_bytes}/{self.max_bytes} bytes>"

    def get(self, key: Key) -> Answer | None:
        """The answer, if it is kept; it is then the last to go."""
        answer = self._answers.get(key)
        if answer is not None:
            self.n_hits += 1
            self._answers.move_to_end(key)
        return answer

    def put(self, key: Key, answer: Answer) -> None:
        """Keep an answer; the least recently used go where room is short. A failure is not kept."""
        size = _size(key, answer)
        if answer.embedding is None or size > self.max_bytes:
            return
        replaced = self._answers.pop(key, None)
        self.n_bytes += size - (_size(key, replaced) if replaced is not None else 0)
        self._answers[key] = answer
        while self.n_bytes > self.max_bytes:
            oldest, gone = self._answers.popitem(last=False)
            self.n_bytes -= _size(oldest, gone)


def _size(key: Key, answer: Answer) -> int:
    (prompt, task, _), text = key
    n_bytes = _text_bytes(prompt) + _text_bytes(task or "") + _text_bytes(text)
    return ENTRY_OVERHEAD + n_bytes + (answer.embedding.nbytes if answer.embedding is not None else 0)


def _text_bytes(text: AnyText) -> int:
    if not isinstance(text, str):
        return len(text.packed)
    return len(text) if text.isascii() else 4 * len(text)
