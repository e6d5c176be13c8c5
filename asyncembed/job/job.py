"""One run over one source: reads it, wires the stages, and sees that all is saved, closed and given back at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncembed.admission import AdmissionQueue, life_bytes
from asyncembed.assembly import Assembler
from asyncembed.chunking import ChunkedText, Chunker
from asyncembed.consumer import ConsumerStatistics
from asyncembed.encoders import Encoder, Instruction
from asyncembed.engine import Engine, EngineHost
from asyncembed.errors import StoreError
from asyncembed.job.delivery import Delivery
from asyncembed.job.loading import load_all
from asyncembed.job.lookup import LOOKED_AT, RUN_BY_US, Lookup, Pending, check_folder
from asyncembed.lane import BULK, Lane, Submission
from asyncembed.limit_memory import LimitMemory
from asyncembed.memory import MemoryBudget, peak_rss_bytes
from asyncembed.options import EmbedOptions
from asyncembed.records import EmbeddedText, Rejected, SourceItem, Summary, Text, process_seconds
from asyncembed.scheduler import LimitEstimator
from asyncembed.sinks import JsonStore
from asyncembed.sources import TextFeed
from asyncembed.splitting import TextSplitter
from asyncembed.threads import WorkerThread
from asyncembed.wording import plural


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


logger = logging.getLogger("asyncembed")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobParts:
    """What a caller may put in the place of the defaults.

    Attributes:
        splitter: Splits long texts.
        estimator: The limit of a batch; nothing is remembered of it.
        limits: What is known of the model's batches; None recalls it, unless there is an `estimator`.
        want_results: Whether somebody reads the results; if not, each ends when it is saved, and vectors saved
            earlier are not read back.
        on_loaded: Called on the event loop when the model is ready.
        on_progress: Called on the event loop after each micro-batch of results.
        host: Whose engine to use as well; None for an engine of the job's own.
    """

    splitter: TextSplitter | None = None
    estimator: LimitEstimator | None = None
    limits: LimitMemory | None = None
    want_results: bool = True
    on_loaded: Callable[[], None] | None = None
    on_progress: Callable[[], None] | None = None
    host: EngineHost | None = None


class Job:
    """`run` does it all; results come out of `results`, each to be given back with `release` once delivered."""

    def __init__(self, source: Any, options: EmbedOptions, parts: JobParts) -> None:
        folder = options.folder
        self._feed = TextFeed(source)
        self.summary = Summary(save_path=str(folder) if folder is not None else None)
        send, receive = anyio.create_memory_object_stream[tuple[Pending, EmbeddedText]](float("inf"))
        self.results: MemoryObjectReceiveStream[tuple[Pending, EmbeddedText]] = receive
        self._results_in: MemoryObjectSendStream[tuple[Pending, EmbeddedText]] = send
        self._options = options
        self._parts = parts
        self._limits = parts.limits
        self._budget = MemoryBudget(options.max_memory_bytes)
        self.admission = AdmissionQueue(self._budget.max_bytes, self._budget.exceeded)
        self._intake = Intake(
            source,
            self._feed,
            self.admission,
            self.summary,
            on_skipped=self._save_skipped,
            on_waiting=self._hasten_head,
        )
        self._store = (
            JsonStore(folder, overwrite=options.overwrite, durability=options.durability)
            if folder is not None
            else None
        )
        self._delivery = Delivery(
            self._store,
            self.summary,
            ordered=options.ordered,
            on_error=options.on_error,
            deliver=self._deliver,
            settled=self._settled,
            on_progress=parts.on_progress,
        )
        self._lookup = Lookup(
            self._store,
            want_vectors=parts.want_results,
            finished=self._delivery.put,
            priority=BULK,
        )
        self._model_thread = WorkerThread("asyncembed-model")
        self._stopping = anyio.CancelScope()
        self._engine: Engine | None = None
        self._lane: Lane | None = None
        self._before = ConsumerStatistics()
        self._ready_at: float | None = None
        self._saved_at: float | None = None
        self._has_baseline = False
        self._is_over = False

    def __repr__(self) -> str:
        return f"<Job in_flight={len(self._intake.in_flight)} {self.admission!r} {self._engine!r}>"

    @property
    def failures(self) -> list[EmbeddedText]:
        """The first thousand failed texts, each with its reason in `error`."""
        return self._delivery.failures

    def stop(self) -> None:
        """End soon: finish the batch in hand and save it. What is not done then is left for the next run."""
        if self._is_over:
            return
        self.summary.stopped = True
        self._stopping.cancel()
        if self._lane is not None:
            self._lane.stop()

    def release(self, pending: Pending) -> None:
        """A result was delivered: its reservation ends."""
        self._intake.release(pending)

    def discard(self) -> None:
        """Close the channels: nobody reads on. Also for a job that was cancelled before its first step."""
        self._results_in.close()
        self.results.close()
        self._delivery.discard()

    def measure(self) -> Summary:
        """The summary with all numbers as they are now."""
        summary = self.summary
        if self._engine is not None and self._lane is not None:
            done, before = self._engine.statistics(), self._before
            summary.dropped_tokens = self._lane.chunking.dropped_tokens
            summary.unknown_tokens = self._lane.chunking.unknown_tokens
            # Of a shared engine these are the batches while the job runs, whoever's rows are in them.
            summary.batches = done.consumer.batches - before.batches
            summary.ooms = done.consumer.ooms - before.ooms
            useful = done.consumer.row_tokens - before.row_tokens
            padded = done.consumer.padded_tokens - before.padded_tokens
            summary.padding = round((padded - useful) / useful, 4) if useful else 0.0
            summary.token_limit = done.token_limit
        summary.others = self._lookup.n_others
        summary.total_seconds = round(process_seconds(), 3)
        summary.peak_rss_bytes = peak_rss_bytes()
        if self._ready_at is not None:
            seconds = (self._saved_at or time.perf_counter()) - self._ready_at
            summary.seconds = round(seconds, 3)
            summary.tokens_per_second = round(summary.tokens / seconds, 1) if seconds else 0.0
        return summary

    async def run(self) -> None:
        """Do the whole job.

        Raises:
            StoreError: The folder is locked, of another model, or cannot be written.
            ModelError: The model cannot be loaded or cannot go on.
            Exception: What the source raised, unchanged, after all texts before it were delivered.
        """
        try:
            async with self._feed:
                await self._run_with_store()
            if self._intake.error is not None:
                raise self._intake.error
        finally:
            self._intake.release_all()
            self._results_in.close()
            self._delivery.discard()
            await self._lookup.aclose()
            # Last, whatever ended the run: a note of a batch that was left behind would look like a death.
            await self._model_thread.aclose(self._limits.close if self._limits is not None else None)

    async def _run_with_store(self) -> None:
        if self._store is None:
            encoder, chunker, _ = await self._load({})
            await self._run_stages(encoder, chunker)
            return
        complete = False
        try:
            await self._store.open(scan=False)
            recorded = {} if self._options.overwrite else self._store.fingerprint or {}
            async with anyio.create_task_group() as group:  # a million texts take as long to list as a model to load
                group.start_soon(self._store.scan)
                encoder, chunker, fingerprint = await self._load(recorded)
            made_with = await self._model_thread.run(encoder.made_with)  # it looks up versions on disk
            await self._store.claim(fingerprint, made_with)
            if self._parts.host is None and encoder.backend in RUN_BY_US:
                stored = await self._store.some(LOOKED_AT)
                root = str(self._store.path)
                await self._model_thread.run(
                    check_folder, root, encoder, Instruction(chunker.prompt, chunker.task), stored
                )
            await self._run_stages(encoder, chunker)
            complete = True
        finally:
            with anyio.CancelScope(shield=True):
                await self._close_store(self._store, complete)

    async def _close_store(self, store: JsonStore, complete: bool) -> None:
        try:
            if not complete:  # what was finished is worth keeping, whatever ended the run
                await self._delivery.save_rest()
        except StoreError as error:
            logger.warning("the last results could not be saved: %s", error)
        finally:
            await store.aclose(complete=complete)
            self.measure()

    async def _load(self, recorded: Mapping[str, Any]) -> tuple[Encoder, Chunker, dict[str, Any]]:
        encoder = None
        if self._parts.host is not None:
            self._engine = await self._parts.host.engine()
            encoder = self._engine.encoder
        # In the job's own thread also where the model is another's: requests must not wait for what needs no model.
        loaded = await self._model_thread.run(load_all, self._options, self._parts.splitter, recorded, encoder)
        encoder = loaded[0]
        self.summary.model, self.summary.device = encoder.name, encoder.device
        self.summary.backend, self.summary.dtype = encoder.backend, encoder.dtype
        return loaded

    async def _run_stages(self, encoder: Encoder, chunker: Chunker) -> None:
        # 1. The engine is another's.   2. The limit is the user's own.   3. It begins with what was learnt before.
        if self._engine is not None:
            await self._run_engine(self._engine, chunker)
            return
        if self._parts.estimator is not None:
            await self._run_engine(self._new_engine(encoder, self._parts.estimator), chunker)
            return
        if self._limits is None:
            self._limits = await self._model_thread.run(LimitMemory, encoder, self._options.token_limit)
        await self._run_engine(self._new_engine(self._limits.encoder, self._limits.estimator), chunker)

    def _new_engine(self, encoder: Encoder, estimator: LimitEstimator) -> Engine:
        return Engine(encoder, estimator, model_thread=self._model_thread, max_rows=self._options.batch_size)

    async def _run_engine(self, engine: Engine, chunker: Chunker) -> None:
        options = self._options
        self._engine = engine
        self._before = replace(engine.statistics().consumer)
        self._lane = lane = engine.open_lane(
            partial(_chunk, chunker),
            Assembler(normalize=options.normalize_embeddings, truncate_dim=options.truncate_dim),
            may_compute=lambda: self._delivery.has_room,
        )
        self._budget.set_baseline(self.admission.statistics().reserved_bytes)
        self._ready_at = time.perf_counter()
        if self._parts.on_loaded is not None:
            self._parts.on_loaded()
        if self.summary.stopped:
            lane.stop()
        async with anyio.create_task_group() as group:
            if self._parts.host is None:
                group.start_soon(engine.run)
            group.start_soon(self._admit_and_look_up, lane, engine.encoder.dim, chunker.chunk_size)
            group.start_soon(self._delivery.run)
            await lane.run()
            if self._parts.host is None:
                engine.close()
            self._delivery.close()
        self._is_over, self._saved_at = True, time.perf_counter()
        if self._intake.error is None and not self._intake.reached_end and not self.summary.stopped:
            raise AssertionError("the stages ended before their source did: this is a bug")
        self.measure()

    async def _admit_and_look_up(self, lane: Lane, dim: int, chunk_size: int) -> None:
        """The stages before the engine: they end with the source, or at once when the job is stopped."""
        send, receive = anyio.create_memory_object_stream[list[Pending]](0)
        try:
            with self._stopping, send, receive:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._lookup.run, receive, lane)
                    await self._intake.run(send, dim, chunk_size, self._options.chunk_overlap)
                    send.close()
        finally:
            lane.close()

    async def _save_skipped(self, rows: list[tuple[str | None, Rejected]]) -> None:
        if self._store is not None:
            await self._store.reject(rows)

    def _settled(self, group: Sequence[Pending]) -> None:
        self._lookup.settled(group)
        if self._lane is not None:
            self._lane.resume()
        has_run = self._engine is not None and self._engine.statistics().consumer.batches > 0
        if has_run and not self._has_baseline:  # the first batch has run: what the model keeps for itself is not growth
            self._has_baseline = True
            self._budget.set_baseline(self.admission.statistics().reserved_bytes)

    def _deliver(self, pending: Pending, record: EmbeddedText) -> None:
        if self._parts.want_results:
            self._results_in.send_nowait((pending, record))
        else:
            self.release(pending)
        if self.admission.statistics().n_waiting:
            self._hasten_head()

    def _hasten_head(self) -> None:
        """The budget is full: bring the text that ordered delivery waits for into the next batch."""
        head = self._delivery.head
        if head is None or self._lane is None:
            return
        pending = self._intake.in_flight.get(head)
        if pending is not None and pending.owner is not None:
            self._lane.hasten(pending.owner)


def _chunk(chunker: Chunker, submissions: Sequence[Submission]) -> Sequence[ChunkedText]:
    return chunker.chunk([(item.owner, str(item.text), item.priority) for item in submissions])
