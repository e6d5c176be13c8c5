"""Texts that wait to be tokenised: pure and synchronous."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from asyncembed.assembly import Assembled
from asyncembed.encoders import Instruction
from asyncembed.records import AnyText

Sink = Callable[[Assembled], None]


class Submission(NamedTuple):
    """A text for the engine.

    Attributes:
        owner: Its number, from `Lane.new_owner`.
        text: The text, or its token ids where the lane chunks those.
        sink: Called on the event loop with what became of it.
        priority: Class of urgency; lower is sooner.
        instruction: What the model is told with it, where the lane takes texts with different ones.
    """

    owner: int
    text: AnyText
    sink: Sink
    priority: int = 0
    instruction: Instruction = Instruction()


class Intake:
    """Submissions by urgency, and within a class in the order they came."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[int, Submission]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, item: Submission) -> None:
        """Let it wait."""
        self._waiting.setdefault(item.priority, {})[item.owner] = item

    def leave(self, item: Submission) -> bool:
        """Let it wait no longer; False if it did not."""
        waiting = self._waiting.get(item.priority, {})
        was_there = waiting.pop(item.owner, None) is not None
        if was_there and not waiting:
            del self._waiting[item.priority]
        return was_there

    def take(self, n_texts: int, n_chars: int) -> list[Submission]:
        """The most urgent, no more than one call of the tokenizer takes; at least one, however long, if any waits."""
        taken: list[Submission] = []
        for priority in sorted(self._waiting):
            for item in self._waiting[priority].values():
                n_chars -= len(item.text)
                if taken and (len(taken) >= n_texts or n_chars < 0):
                    break
                taken.append(item)
            else:
                continue
            break
        for item in taken:
            self.leave(item)
        return taken

    def clear(self) -> None:
        """Drop all."""
        self._waiting.clear()
