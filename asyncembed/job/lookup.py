"""Which texts of the input are new, which an earlier run has saved, and which repeat one of this run.

Texts saved before are also compared with what the model makes of them now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from asyncembed.encoders import Encoder, Instruction, Tokenizer, input_of
from asyncembed.engine.scheduler import BULK
from asyncembed.engine.work import Client, Work
from asyncembed.errors import CorruptRecordError, StoreMismatchError
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
from asyncembed.store import DigestSet, Store, StoredText
from asyncembed.store.store import Found
from asyncembed.threads import WorkerThread


@dataclass(slots=True, eq=False)
class Entry:
    """An item of the input from its reservation to its delivery.

    Attributes:
        item: What the source gave.
        index: Position in the input.
        reserved: Bytes reserved for its life.
        place: Where it stood in the input, for messages.
        id: `text_id`, once looked up; empty for an item that is no text.
        work: What the engine makes of it, or made; several entries of one text share it.
        stored: What the store holds of it, if that was read.
        is_duplicate: It repeats a text that this run has computed or is computing.
        cached: An earlier run had saved it.
    """

    item: SourceItem
    index: int
    reserved: int
    place: str | None = None
    id: str = ""
    work: Work | None = None
    stored: StoredText | None = None
    is_duplicate: bool = False
    cached: bool = False

    @property
    def text(self) -> str:
        """The text; empty for an item that is none."""
        return self.item.text if isinstance(self.item, Text) else ""

    @property
    def is_computed(self) -> bool:
        """Whether this run has computed it, and nobody else is counted for that."""
        return self.work is not None and self.work.error is None and not self.is_duplicate

    def record(self) -> EmbeddedText:
        """The record that is delivered and saved."""
        item, work, stored = self.item, self.work, self.stored
        # 1. no text at all   2. computed, or failed   3. read back   4. saved, and its vector was not asked for
        if isinstance(item, Rejected):
            return EmbeddedText("", self.index, item.key, "", None, error=item.reason, place=self.place)
        known = (self.id, self.index, item.key, item.text)
        if work is not None and work.error is not None:
            return EmbeddedText(*known, None, error=work.error, place=self.place)
        if work is not None:
            return EmbeddedText(*known, work.embedding, work.pieces(), work.n_tokens)
        if stored is not None:
            return EmbeddedText(*known, stored.embedding, stored.chunks, stored.n_tokens, cached=self.cached)
        return EmbeddedText(*known, None, cached=self.cached)


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
    return Chunk(None, 0, chunk.text, 0, ids, chunk.n_tokens, *how)


def check_folder(folder: str, encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText]) -> None:
    """Refuse to go on with a folder whose vectors are not the model's, judging by the first chunk of a few texts."""
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


HASHED_AT_ONCE = 1 << 16
"""Most characters that are hashed on the event loop, a tenth of a millisecond or two."""

MOST_COUNTED = 1_000_000
"""In a larger folder it is not counted how many of its texts are none of the input: that takes 16 bytes for each."""


class Sharing:
    """Tells new texts from those that are saved and those that repeat another. Pure: it asks nobody.

    Identical texts are computed once: while the first is under way the others wait for its result; afterwards they
    are known as written, if anything is written.
    """

    def __init__(self) -> None:
        self._first: dict[str, Entry] = {}  # of each text under way the entry that is computed
        self.settled_meanwhile: set[str] = set()

    def sort(
        self, client: Client, group: Sequence[Entry], found: Iterable[Found]
    ) -> tuple[list[Work], list[Entry], list[Entry]]:
        """Those to compute, those that are saved, and those that are finished; `found` is known of the texts."""
        new: list[Work] = []
        saved: list[Entry] = []
        finished: list[Entry] = []
        of_texts = iter(found)
        for entry in group:
            if isinstance(entry.item, Rejected):
                finished.append(entry)
                continue
            entry.id, is_done, is_written = next(of_texts)
            # 1. repeats one under way   2. saved by an earlier run   3. by this one, perhaps while that was asked
            # 4. new
            if entry.id in self._first:
                self.join(client, entry, new, finished)
            elif is_done or is_written or entry.id in self.settled_meanwhile:
                entry.cached, entry.is_duplicate = is_done, not is_done
                saved.append(entry)
            else:
                self.join(client, entry, new, finished)
        return new, saved, finished

    def join(self, client: Client, entry: Entry, new: list[Work], finished: list[Entry]) -> None:
        """A text to compute, or one more that waits for the first of the same text."""
        entry.cached = entry.is_duplicate = False
        first = self._first.setdefault(entry.id, entry)
        if first is entry:
            entry.work = Work(client, entry.text, BULK)
            entry.work.waiters.append(entry)
            new.append(entry.work)
            return
        entry.is_duplicate, entry.work = True, first.work
        if first.work is not None and first.work.is_pending:
            first.work.waiters.append(entry)
        else:
            finished.append(entry)

    def settled(self, group: Iterable[Entry]) -> None:
        """Nobody needs to wait for these any more: they were saved, or nothing is."""
        for entry in group:
            if self._first.get(entry.id) is entry:
                del self._first[entry.id]
            if entry.is_computed:
                self.settled_meanwhile.add(entry.id)

    def __len__(self) -> int:
        return len(self._first)


class Lookup:
    """What a job's texts are, asked of its store. Without one only texts under way are shared: an endless stream must
    not grow a set.
    """

    def __init__(self, store: Store | None, *, want_vectors: bool) -> None:
        self._store = store
        self._want_vectors = want_vectors
        self._sharing = Sharing()
        self._found = DigestSet()  # texts of the input that an earlier run has saved
        self._thread = WorkerThread("asyncembed-lookup")

    def __repr__(self) -> str:
        return f"<Lookup under_way={len(self._sharing)}>"

    @property
    def n_others(self) -> int | None:
        """Texts that earlier runs have saved and the input has not named so far; None if they are not counted."""
        if self._store is None or self._store.n_done > MOST_COUNTED:
            return None
        return self._store.n_done - len(self._found)

    async def look_up(self, client: Client, group: Sequence[Entry]) -> tuple[list[Work], list[Entry]]:
        """The texts that must be computed, and the entries that are finished. All others wait for one under way."""
        self._sharing.settled_meanwhile.clear()
        found = await self._find(group)
        if self._store is None:  # what has settled is kept nowhere
            self._sharing.settled_meanwhile.clear()
        new, saved, finished = self._sharing.sort(client, group, found)
        if saved and self._store is not None and self._want_vectors:
            stored = await self._store.read_many([entry.id for entry in saved])
            for entry, read in zip(saved, stored, strict=True):
                if isinstance(read, CorruptRecordError):  # new again
                    self._sharing.join(client, entry, new, finished)
                else:
                    entry.stored = read
                    finished.append(entry)
        else:
            finished += saved
        return new, finished

    def settled(self, group: Iterable[Entry]) -> None:
        """These were saved, or there is no store: nobody needs to wait for them any more."""
        self._sharing.settled(group)

    async def aclose(self) -> None:
        """Ends the thread."""
        await self._thread.aclose()

    async def _find(self, group: Sequence[Entry]) -> list[Found]:
        """What is known of each text of the group: in the store's thread, or in its own if there is much to hash."""
        texts = [entry.item.text for entry in group if isinstance(entry.item, Text)]
        if self._store is not None:
            found = await self._store.find(texts)
            if self.n_others is not None:
                self._found.add_many([one.id for one in found if one.is_done])
        elif sum(map(len, texts)) <= HASHED_AT_ONCE:
            found = _identified(texts)
        else:
            found = await self._thread.run(_identified, texts)
        return found


def _identified(texts: Sequence[str]) -> list[Found]:
    return [Found(text_id(text)) for text in texts]
