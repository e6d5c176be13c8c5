"""The second stage: which texts are new, which an earlier run has saved, which repeat one of this run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress

from anyio.streams.memory import MemoryObjectReceiveStream

from asyncembed.assembly import Assembled
from asyncembed.errors import ClosedError, CorruptRecordError
from asyncembed.intake import Submission
from asyncembed.job.pending import Pending
from asyncembed.lane import Lane
from asyncembed.records import Rejected, text_id
from asyncembed.sinks import DigestSet, JsonStore
from asyncembed.threads import WorkerThread

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
