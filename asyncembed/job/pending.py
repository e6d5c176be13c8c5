"""A text on its way through a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyncembed.assembly import Assembled
from asyncembed.records import EmbeddedText, Rejected, SourceItem, Text
from asyncembed.sinks import StoredText


@dataclass(slots=True, eq=False)
class Pending:
    """A text from its reservation to its delivery.

    Attributes:
        item: What the source gave.
        index: Position in the input.
        reserved: Bytes reserved for its life.
        place: Where it stood in the input, for messages.
        id: `text_id`, once looked up; empty for an item that is no text.
        owner: Its number within the engine, if it went there.
        followers: Repeats of the same text that wait for its result.
        is_duplicate: It repeats a text that this run has computed or is computing.
        result: What became of it.
        cached: An earlier run had saved it.
    """

    item: SourceItem
    index: int
    reserved: int
    place: str | None = None
    id: str = ""
    owner: int | None = None
    followers: list[Pending] = field(default_factory=list)
    is_duplicate: bool = False
    result: Assembled | StoredText | None = None
    cached: bool = False

    @property
    def text(self) -> str:
        """The text; empty for an item that is none."""
        return self.item.text if isinstance(self.item, Text) else ""

    def record(self) -> EmbeddedText:
        """The record that is delivered and saved."""
        result = self.result
        known: dict[str, Any] = {"index": self.index, "key": self.item.key, "text": self.text}
        # 1. no text at all   2. saved already, and its vector was not asked for   3. read back, or computed
        if isinstance(self.item, Rejected):
            return EmbeddedText(id="", **known, embedding=None, error=self.item.reason, place=self.place)
        if result is None:
            return EmbeddedText(id=self.id, **known, embedding=None, cached=self.cached)
        error = result.error if isinstance(result, Assembled) else None
        return EmbeddedText(
            id=self.id,
            **known,
            embedding=result.embedding,
            chunks=result.chunks,
            n_tokens=result.n_tokens,
            error=error,
            cached=self.cached,
            place=self.place if error is not None else None,
        )
