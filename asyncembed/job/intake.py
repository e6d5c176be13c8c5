"""The first stage: take texts from the source and let each in when its whole life fits the budget."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from anyio.streams.memory import MemoryObjectSendStream

from asyncembed.admission import AdmissionQueue, life_bytes
from asyncembed.job.pending import Pending
from asyncembed.records import Rejected, SourceItem, Text
from asyncembed.sources import TextFeed
from asyncembed.summary import Summary
from asyncembed.wording import plural

logger = logging.getLogger("asyncembed")


class Intake:
    """Reads a source into groups of admitted texts."""

    def __init__(
        self,
        source: Any,
        feed: TextFeed,
        admission: AdmissionQueue,
        summary: Summary,
        *,
        on_skipped: Callable[[list[tuple[str | None, Rejected]]], Awaitable[None]],
        on_waiting: Callable[[], None],
    ) -> None:
        self.error: BaseException | None = None
        self.in_flight: dict[int, Pending] = {}
        self._source = source
        self._name: str | None = getattr(source, "name", None) if hasattr(source, "n_blank") else None
        self._feed = feed
        self._admission = admission
        self._summary = summary
        self._on_skipped = on_skipped
        self._on_waiting = on_waiting
        self._n_texts = 0
        self.reached_end = False

    def release(self, pending: Pending) -> None:
        """The text's life is over: give its reservation back. Idempotent."""
        if self.in_flight.pop(pending.index, None) is not None:
            self._admission.release(pending.reserved)

    def release_all(self) -> None:
        """Give back what is still reserved, at the end of a run."""
        for pending in list(self.in_flight.values()):
            self.release(pending)

    async def run(
        self, admitted: MemoryObjectSendStream[list[Pending]], dim: int, chunk_size: int, chunk_overlap: int
    ) -> None:
        """Read to the end of the source. What the source raises is kept in `error` and ends the reading."""
        while (items := await self._next_items()) is not None:
            skipped: list[tuple[str | None, Rejected]] = []
            group: list[Pending] = []
            for item in items:
                if isinstance(item, Rejected) and item.skipped:
                    skipped.append((self._place(item), item))
                    continue
                reserved = life_bytes(item.text if isinstance(item, Text) else "", dim, chunk_size, chunk_overlap)
                if not self._admission.reserve_nowait(reserved):
                    if group:  # those before it must go on, or the room would never come
                        await admitted.send(group)
                        group = []
                    self._on_waiting()
                    await self._admission.reserve(reserved)
                pending = Pending(item, self._n_texts, reserved, self._place(item))
                self._n_texts += 1
                self.in_flight[pending.index] = pending
                group.append(pending)
            if skipped:
                self._summary.skipped += len(skipped)
                await self._on_skipped(skipped)
            if group:
                await admitted.send(group)

    async def _next_items(self) -> Sequence[SourceItem] | None:
        try:
            return await self._feed.__anext__()
        except StopAsyncIteration:
            self.reached_end = True
            return None
        except Exception as error:
            self.error = error
            if self.in_flight:
                logger.warning(
                    "the input cannot be read further; finishing %s before", plural(len(self.in_flight), "text")
                )
            return None
        finally:
            blank = int(getattr(self._source, "n_blank", 0))
            self._summary.skipped += blank - self._summary.blank
            self._summary.blank = blank

    def _place(self, item: SourceItem) -> str | None:
        return f"{self._name}:{item.line}" if self._name is not None and item.line is not None else None
