"""The second stage: which texts are new, which an earlier run has saved, which repeat one of this run.

What is under way is a `Pending` each; texts saved before are compared with what the model makes of them now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
from anyio.streams.memory import MemoryObjectReceiveStream

from asyncembed.assembly import Assembled
from asyncembed.encoders import Encoder, Instruction, Tokenizer, input_of
from asyncembed.errors import ClosedError, CorruptRecordError, StoreMismatchError
from asyncembed.lane import Lane, Submission
from asyncembed.records import (
    Batch,
    Chunk,
    EmbeddedChunk,
    EmbeddedText,
    FloatVector,
    Rejected,
    SourceItem,
    Text,
    text_id,
)
from asyncembed.sinks import DigestSet, JsonStore, StoredText
from asyncembed.threads import WorkerThread


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


MIN_COSINE = 0.9999
"""What a vector and the same computed again must agree by in float32."""

MIN_COSINE_ROUGH = 0.99
"""The same in a lower precision, and for a job that looks at a few texts before it goes on with a folder."""

LOOKED_AT = 3
"""Stored texts that are computed again before a job goes on with their folder."""

LARGEST_LOOKED_AT = 256
"""Tokens of the largest chunk that is computed again so: it runs alone, outside the limits of a job's batches."""

RUN_BY_US = ("torch", "openvino")
"""Backends whose vectors must agree; what an encoder of the user's own promises, we do not know."""


def disagreements(
    encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText], least: float
) -> Iterator[tuple[StoredText, float]]:
    """The texts of which a chunk has another vector than the model gives, each with its lowest cosine.

    One chunk is computed at a time, in the thread that calls. Chunks that the model no longer takes are passed over.
    """
    tokenizer, max_tokens = input_of(encoder, instruction.task)
    probe, bare = tokenizer.tokenize([instruction.prompt + "a", "a"])
    n_prompt = probe.n_content - bare.n_content  # as the chunker counts them
    for stored in texts:
        lowest = 1.0
        for chunk in stored.chunks:
            row = _row_of(tokenizer, instruction, n_prompt, chunk)
            if row is not None and row.length <= max_tokens:
                lowest = min(lowest, _cosine(encoder.finish(encoder.start(Batch((row,))))[0], chunk.embedding))
        if not lowest >= least:
            yield stored, lowest


def _row_of(tokenizer: Tokenizer, instruction: Instruction, n_prompt: int, chunk: EmbeddedChunk) -> Chunk | None:
    """What was computed of a stored chunk: the first `n_tokens` tokens of its text, as it may have been truncated.

    None if its text has fewer: it was tokenised otherwise.
    """
    found = tokenizer.tokenize([instruction.prompt + chunk.text])[0]
    n_dropped = found.n_content - n_prompt - chunk.n_tokens
    if n_dropped < 0:
        return None
    end = len(found.ids) - found.n_suffix
    ids = np.concatenate((found.ids[: end - n_dropped], found.ids[end:]))
    how = (instruction.prompt, instruction.task, n_dropped > 0)
    return Chunk(0, 0, chunk.text, 0, ids, chunk.n_tokens, 0, *how)


def check_folder(folder: str, encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText]) -> None:
    """Refuse to go on with a folder whose vectors are not the model's, judging by the first chunk of a few texts.

    Raises:
        StoreMismatchError: One of them is another.
    """
    heads = (replace(stored, chunks=stored.chunks[:1]) for stored in texts)
    small = (stored for stored in heads if all(chunk.n_tokens <= LARGEST_LOOKED_AT for chunk in stored.chunks))
    try:
        wrong = next(disagreements(encoder, instruction, small, MIN_COSINE_ROUGH), None)
    except Exception:  # the job will meet that as well, and knows what to do
        return
    if wrong is not None:
        stored, cosine = wrong
        raise StoreMismatchError(
            f"{folder}: the vector it holds of {stored.text[:40]!r} is not what the model gives (cosine "
            f"{cosine:.4f}); asyncembed-store verify --recompute N --remove-damaged looks at N of its texts and "
            "removes such files; or choose another save path, or overwrite"
        )


def _cosine(computed: FloatVector, stored: FloatVector) -> float:
    a, b = computed[: len(stored)].astype(np.float64), stored.astype(np.float64)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else 0.0


MOST_COUNTED = 1_000_000
"""In a larger folder it is not counted how many of its texts are none of the input: that takes 16 bytes for each."""


class Lookup:
    """Hands new texts to the engine and passes all others on.

    Identical texts are computed once: while the first is under way the others wait for its result; afterwards they
    are read from the store. Without a store only texts under way are shared: an endless stream must not grow a set.
    """

    def __init__(
        self, store: JsonStore | None, *, want_vectors: bool, finished: Callable[[Pending], None], priority: int = 0
    ) -> None:
        self._store = store
        self._priority = priority
        self._want_vectors = want_vectors
        self._finished = finished
        self._leaders: dict[str, Pending] = {}
        self._settled_meanwhile: set[str] = set()
        self._found = DigestSet()  # texts of the input that an earlier run has saved
        self._thread = WorkerThread("asyncembed-lookup")

    def __repr__(self) -> str:
        return f"<Lookup under_way={len(self._leaders)}>"

    @property
    def n_others(self) -> int | None:
        """Texts that earlier runs have saved and the input has not named so far; None if they are not counted."""
        if self._store is None or self._store.n_done > MOST_COUNTED:
            return None
        return self._store.n_done - len(self._found)

    async def run(self, admitted: MemoryObjectReceiveStream[list[Pending]], lane: Lane) -> None:
        """Look up all that is admitted, to the end of the stream."""
        async for group in admitted:
            self._settled_meanwhile.clear()
            done = await self._thread.run(self._identify, group)
            new, saved = self._sort(group, done, await self._saved_by_this_run(group))
            if saved:
                new += await self._read_saved(saved)
            if new:
                try:
                    await lane.submit([self._submission(pending, lane) for pending in new])
                except ClosedError:
                    return  # it failed or was stopped, and says so itself

    def settled(self, group: Sequence[Pending]) -> None:
        """These were saved, or there is no store: nobody needs to wait for them any more."""
        for pending in group:
            if self._leaders.get(pending.id) is pending:
                del self._leaders[pending.id]
        self._settled_meanwhile.update(pending.id for pending in group if _is_new(pending))

    async def aclose(self) -> None:
        """End the thread."""
        await self._thread.aclose()

    def _identify(self, group: Sequence[Pending]) -> list[bool]:
        """In the thread: give each text its id, and find out whether an earlier run has saved it."""
        for pending in group:
            if not isinstance(pending.item, Rejected):
                pending.id = text_id(pending.text)
        if self._store is None:
            return [False] * len(group)
        texts = [pending.id for pending in group if pending.id]
        done = self._store.done_before(texts)
        if self.n_others is not None:
            self._found.add_many(list(compress(texts, done)))
        found = iter(done)
        return [next(found) if pending.id else False for pending in group]

    def _sort(
        self, group: Sequence[Pending], done: Sequence[bool], saved_now: Sequence[bool]
    ) -> tuple[list[Pending], list[Pending]]:
        """Those to compute and those to read back; all others are finished, or wait for another."""
        new: list[Pending] = []
        saved: list[Pending] = []
        for pending, is_done, is_saved_now in zip(group, done, saved_now, strict=True):
            # 1. no text at all   2. saved by an earlier run   3. repeats one under way
            # 4. repeats one that this run has saved   5. new
            if isinstance(pending.item, Rejected):
                self._finished(pending)
            elif is_done and pending.id not in self._leaders:
                pending.cached = True
                saved.append(pending)
            elif (leader := self._leaders.get(pending.id)) is not None:
                pending.is_duplicate = True
                self._follow(leader, pending)
            elif is_saved_now:
                pending.is_duplicate = True
                saved.append(pending)
            else:
                self._leaders[pending.id] = pending
                new.append(pending)
        return new, saved

    async def _saved_by_this_run(self, group: Sequence[Pending]) -> list[bool]:
        """Asked in the store's thread, which knows what it has written; what was settled while it was asked counts."""
        if self._store is None:
            return [False] * len(group)
        found = iter(await self._store.written_many([pending.id for pending in group if pending.id]))
        return [(next(found) or pending.id in self._settled_meanwhile) if pending.id else False for pending in group]

    def _follow(self, leader: Pending, pending: Pending) -> None:
        if leader.result is None:
            leader.followers.append(pending)
        else:
            pending.result = leader.result
            self._finished(pending)

    async def _read_saved(self, saved: list[Pending]) -> list[Pending]:
        """Finish saved texts, with their vectors if those are wanted; those whose file is damaged are new again."""
        if self._store is None:
            raise AssertionError("a text is saved, but there is no store: this is a bug")
        if not self._want_vectors:
            for pending in saved:
                self._finished(pending)
            return []
        damaged: list[Pending] = []
        for pending, stored in zip(saved, await self._store.read_many([p.id for p in saved]), strict=True):
            if not isinstance(stored, CorruptRecordError):
                pending.result = stored
                self._finished(pending)
                continue
            pending.cached = pending.is_duplicate = False
            if (leader := self._leaders.setdefault(pending.id, pending)) is pending:
                damaged.append(pending)
            else:
                pending.is_duplicate = True
                self._follow(leader, pending)
        return damaged

    def _submission(self, pending: Pending, lane: Lane) -> Submission:
        pending.owner = lane.new_owner()
        return Submission(pending.owner, pending.text, partial(self._computed, pending), self._priority)

    def _computed(self, pending: Pending, result: Assembled) -> None:
        pending.result = result
        self._finished(pending)
        followers, pending.followers = pending.followers, []
        for follower in followers:
            follower.result = result
            self._finished(follower)


def _is_new(pending: Pending) -> bool:
    result = pending.result
    return not pending.is_duplicate and isinstance(result, Assembled) and result.error is None
