"""One run over one source: one coroutine reads it, looks its texts up and submits them, another saves and delivers.

It sees that all is saved, closed and given back at the end.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio

from asyncembed.encoders import Encoder, Instruction
from asyncembed.engine.admission import AdmissionQueue, life_bytes
from asyncembed.engine.chunking import Chunker, TextSplitter
from asyncembed.engine.client import EngineClient
from asyncembed.engine.engine import EncoderThread, Engine, EngineHost, EngineStatistics
from asyncembed.engine.limit_memory import LimitMemory
from asyncembed.engine.memory import MemoryBudget, peak_rss_bytes
from asyncembed.engine.scheduler import LimitEstimator
from asyncembed.errors import ClosedError, StoreError, TextsFailedError
from asyncembed.job.loading import load_all
from asyncembed.job.lookup import LOOKED_AT, RUN_BY_US, Entry, Lookup, check_folder
from asyncembed.options import EmbedOptions
from asyncembed.records import EmbeddedText, Rejected, SourceItem, Summary, Text, process_seconds
from asyncembed.sources import TextFeed
from asyncembed.store import Store
from asyncembed.threads import WorkerThread
from asyncembed.wording import plural

logger = logging.getLogger("asyncembed")

COMMIT_RECORDS = 256
"""Most records of one commit, which is one hop to the store's thread."""

KEPT_FAILURES = 1000
"""Failed records kept in memory; all are in `errors.jsonl`."""

Delivered = tuple[Entry, EmbeddedText]


class OrderBuffer:
    """Holds results that came early until all before them have come."""

    def __init__(self) -> None:
        self.next_index = 0
        self._held: dict[int, Delivered] = {}

    def push(self, items: Sequence[Delivered]) -> list[Delivered]:
        """Adds results; those whose turn has come, in order."""
        self._held.update((item[0].index, item) for item in items)
        ready: list[Delivered] = []
        while (item := self._held.pop(self.next_index, None)) is not None:
            ready.append(item)
            self.next_index += 1
        return ready

    def rest(self) -> list[Delivered]:
        """All that is still held, in order, gaps skipped: no more will come."""
        held, self._held = self._held, {}
        return [held[index] for index in sorted(held)]


class Results:
    """Results that wait for their reader. Each holds its reservation meanwhile, which bounds them."""

    def __init__(self) -> None:
        self._waiting: deque[Delivered] = deque()
        self._changed = anyio.Event()
        self._closed = self._discarded = False

    def put(self, items: Sequence[Delivered]) -> None:
        """Adds results."""
        if not self._discarded:
            self._waiting.extend(items)
            self._notify()

    def close(self) -> None:
        """No more will come."""
        self._closed = True
        self._notify()

    def discard(self) -> None:
        """Nobody reads on."""
        self._discarded = True
        self._waiting.clear()
        self._notify()

    def take(self) -> Iterator[Delivered]:
        """Results that have come, one by one."""
        while self._waiting:
            yield self._waiting.popleft()

    async def wait(self) -> bool:
        """Waits for more; False when there are none. Gives the loop a turn in any case."""
        await anyio.lowlevel.checkpoint()
        while not self._waiting:
            if self._discarded:
                raise ClosedError("the stream was closed while it was being read")
            if self._closed:
                return False
            self._changed = anyio.Event()
            await self._changed.wait()
        return True

    def _notify(self) -> None:
        self._changed.set()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobParts:
    """What a caller may put in the place of the defaults.

    Attributes:
        splitter: Splits long texts.
        estimator: The limit of a batch; nothing is remembered of it.
        load: Gives the model, in the model's thread, from what the folder records; None loads what the options name.
        limits: What is known of a model's batches.
        want_results: Whether somebody reads the results; if not, each ends when it is saved, and vectors saved
            earlier are not read back.
        on_loaded: Called on the event loop when the model is ready.
        on_progress: Called on the event loop after each micro-batch of results.
        host: Whose engine to use as well; None for an engine of the job's own.
    """

    splitter: TextSplitter | None = None
    estimator: LimitEstimator | None = None
    load: Callable[[Mapping[str, Any]], Encoder] | None = None
    limits: Callable[[Encoder], LimitMemory] | None = None
    want_results: bool = True
    on_loaded: Callable[[], None] | None = None
    on_progress: Callable[[], None] | None = None
    host: EngineHost | None = None


class Job:
    """`run` does it all; results come out of `results`, each to be given back with `release` once delivered."""

    def __init__(self, source: Any, options: EmbedOptions, parts: JobParts) -> None:
        folder = options.folder
        self.summary = Summary(save_path=str(folder) if folder is not None else None)
        self.failures: list[EmbeddedText] = []
        self.results = Results()
        self.in_flight: dict[int, Entry] = {}
        self._source = source
        self._source_name: str | None = getattr(source, "name", None) if hasattr(source, "n_blank") else None
        self._source_error: BaseException | None = None
        self._source_ended = False
        self._n_read = 0
        self._feed = TextFeed(source)
        self._options = options
        self._parts = parts
        self._limits: LimitMemory | None = None
        self._budget = MemoryBudget(options.max_memory_bytes)
        self.admission = AdmissionQueue(self._budget.max_bytes, self._budget.exceeded)
        self._store: Store | None = None
        if folder is not None:
            self._store = Store(folder, overwrite=options.overwrite, durability=options.durability)
        self._lookup = Lookup(self._store, want_vectors=parts.want_results)
        self._order = OrderBuffer() if options.ordered else None
        self._unsaved: deque[Entry] = deque()
        self._model_thread = WorkerThread("asyncembed-model")
        self._stopping = anyio.CancelScope()
        self._engine: Engine | None = None
        self._client: EngineClient | None = None
        self._before = EngineStatistics()
        self._ready_at: float | None = None
        self._saved_at: float | None = None
        self._has_baseline = False
        self._is_over = False

    def __repr__(self) -> str:
        return f"<Job in_flight={len(self.in_flight)} {self.admission!r} {self._engine!r}>"

    def stop(self) -> None:
        """Ends soon: the batch in hand is finished and saved. What is not done then is left for the next run."""
        if self._is_over:
            return
        self.summary.stopped = True
        self._stopping.cancel()
        if self._client is not None:
            self._client.stop()

    def release(self, entry: Entry) -> None:
        """An entry was delivered, or its life is over: its reservation ends. Idempotent."""
        if self.in_flight.pop(entry.index, None) is not None:
            self.admission.release(entry.reserved)

    def discard(self) -> None:
        """Nobody reads on. Also for a job that was cancelled before its first step."""
        self.results.discard()

    def measure(self) -> Summary:
        """The summary with all numbers as they are now."""
        summary = self.summary
        if self._engine is not None and self._client is not None:
            done, before = self._engine.statistics, self._before
            summary.dropped_tokens = self._client.dropped_tokens
            summary.unknown_tokens = self._client.unknown_tokens
            # Of a shared engine these are the batches while the job runs, whoever's rows are in them.
            summary.batches = done.batches - before.batches
            summary.ooms = done.ooms - before.ooms
            useful = done.row_tokens - before.row_tokens
            padded = done.padded_tokens - before.padded_tokens
            summary.padding = round((padded - useful) / useful, 4) if useful else 0.0
            summary.token_limit = self._engine.token_limit
        summary.others = self._lookup.n_others
        summary.total_seconds = round(process_seconds(), 3)
        summary.peak_rss_bytes = peak_rss_bytes()
        if self._ready_at is not None:
            seconds = (self._saved_at or time.perf_counter()) - self._ready_at
            summary.seconds = round(seconds, 3)
            summary.tokens_per_second = round(summary.tokens / seconds, 1) if seconds else 0.0
        return summary

    async def run(self) -> None:
        """Does the whole job."""
        try:
            async with self._feed:
                await self._run_with_store()
            if self._source_error is not None:
                raise self._source_error
        finally:
            for entry in list(self.in_flight.values()):
                self.release(entry)
            self.results.close()
            try:
                await self._lookup.aclose()
            finally:
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

    async def _close_store(self, store: Store, complete: bool) -> None:
        try:
            if not complete:  # what was finished is worth keeping, whatever ended the run
                rest = [*self._unsaved, *(self._client.finished_nowait() if self._client is not None else [])]
                for start in range(0, len(rest), COMMIT_RECORDS):
                    await store.commit([entry.record() for entry in rest[start : start + COMMIT_RECORDS]])
        except StoreError as error:
            logger.warning("the last results could not be saved: %s", error)
        finally:
            await store.aclose(complete=complete)
            self.measure()

    async def _load(self, recorded: Mapping[str, Any]) -> tuple[Encoder, Chunker, dict[str, Any]]:
        options, load = self._options, self._parts.load
        if self._parts.host is not None:
            self._engine = engine = await self._parts.host.engine()
            load = lambda _: engine.encoder  # noqa: E731  # as short as it gets
        # In the job's own thread also where the model is another's: requests must not wait for what needs no model.
        loaded = await self._model_thread.run(load_all, options, self._parts.splitter, recorded, load)
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
        remember = self._parts.limits or partial(LimitMemory, token_limit=self._options.token_limit)
        self._limits = await self._model_thread.run(remember, encoder)
        await self._run_engine(self._new_engine(encoder, self._limits.estimator), chunker)

    def _new_engine(self, encoder: Encoder, estimator: LimitEstimator) -> Engine:
        max_rows = self._options.batch_size
        thread = self._model_thread
        return Engine(EncoderThread(encoder, estimator, thread=thread, max_rows=max_rows, memory=self._limits))

    async def _run_engine(self, engine: Engine, chunker: Chunker) -> None:
        options = self._options
        self._engine = engine
        self._before = replace(engine.statistics)
        self._client = client = EngineClient(
            engine,
            chunker.chunk,
            normalize=options.normalize_embeddings,
            truncate_dim=options.truncate_dim,
            max_unsaved=COMMIT_RECORDS,
        )
        self._budget.set_baseline(self.admission.statistics().reserved_bytes)
        self._ready_at = time.perf_counter()
        if self._parts.on_loaded is not None:
            self._parts.on_loaded()
        if self.summary.stopped:
            client.stop()
        async with anyio.create_task_group() as group:
            if self._parts.host is None:
                group.start_soon(engine.run)
            group.start_soon(self._read, client, engine.encoder.dim, chunker)
            group.start_soon(self._deliver, client)
            await client.run()
            if self._parts.host is None:
                engine.close()
        self._is_over, self._saved_at = True, time.perf_counter()
        if self._source_error is None and not self._source_ended and not self.summary.stopped:
            raise AssertionError("the stages ended before their source did: this is a bug")
        self.measure()

    # --- reading ------------------------------------------------------------------------------------------------

    async def _read(self, client: EngineClient, dim: int, chunker: Chunker) -> None:
        """Reads the source, admits its texts, looks them up and submits them, to the end or until it is stopped."""
        try:
            with self._stopping:
                while (items := await self._next_items()) is not None:
                    await self._admit(client, items, dim, chunker)
        except ClosedError:
            pass  # the client failed or was stopped, and says so itself
        finally:
            client.close()

    async def _next_items(self) -> Sequence[SourceItem] | None:
        """The next items; None at the end. What the source raises is kept, and ends the reading."""
        try:
            return await self._feed.__anext__()
        except StopAsyncIteration:
            self._source_ended = True
            return None
        except Exception as error:
            self._source_error = error
            if self.in_flight:
                logger.warning(
                    "the input cannot be read further; finishing %s before", plural(len(self.in_flight), "text")
                )
            return None
        finally:
            blank = int(getattr(self._source, "n_blank", 0))
            self.summary.skipped += blank - self.summary.blank
            self.summary.blank = blank

    async def _admit(self, client: EngineClient, items: Sequence[SourceItem], dim: int, chunker: Chunker) -> None:
        """Reserves the life of each text, in groups as room comes."""
        skipped: list[tuple[str | None, Rejected]] = []
        group: list[Entry] = []
        for item in items:
            place = f"{self._source_name}:{item.line}" if self._source_name and item.line is not None else None
            if isinstance(item, Rejected) and item.skipped:
                skipped.append((place, item))
                continue
            text = item.text if isinstance(item, Text) else ""
            reserved = life_bytes(text, dim, chunker.chunk_size, self._options.chunk_overlap)
            if not self.admission.reserve_nowait(reserved):
                if group:  # those before it must go on, or the room would never come
                    await self._submit(client, group)
                    group = []
                self._hasten_head()
                await self.admission.reserve(reserved)
            entry = Entry(item, self._n_read, reserved, place)
            self._n_read += 1
            self.in_flight[entry.index] = entry
            group.append(entry)
        if skipped:
            self.summary.skipped += len(skipped)
            if self._store is not None:
                await self._store.reject(skipped)
        if group:
            await self._submit(client, group)

    async def _submit(self, client: EngineClient, group: list[Entry]) -> None:
        works, finished = await self._lookup.look_up(client, group)
        if finished:
            client.pass_on(finished)
        if works:
            await client.submit(works)

    # --- saving and delivering ----------------------------------------------------------------------------------

    async def _deliver(self, client: EngineClient) -> None:
        """Saves what is finished in micro-batches, counts it, puts it in order and hands it over, to the end."""
        while entries := await client.finished():
            self._unsaved.extend(entries)
            while self._unsaved:
                await self._save([self._unsaved.popleft() for _ in range(min(COMMIT_RECORDS, len(self._unsaved)))])
        if self._order is not None:  # of a run that was stopped, results are left whose turn never came
            self._hand_over(self._order.rest())

    async def _save(self, group: list[Entry]) -> None:
        results = [(entry, entry.record()) for entry in group]
        if self._store is not None:
            await self._store.commit([record for _, record in results])
        self._lookup.settled(group)
        self._set_baseline()
        for entry, record in results:
            self._count(entry, record)
        self._hand_over(results if self._order is None else self._order.push(results))
        if self.admission.statistics().n_waiting:
            self._hasten_head()
        if self._parts.on_progress is not None:
            self._parts.on_progress()

    def _count(self, entry: Entry, record: EmbeddedText) -> None:
        summary = self.summary
        summary.texts += 1
        # 1. failed   2. an earlier run's   3. a repeat   4. this run's
        if record.error is not None:
            summary.failed += 1
            if len(self.failures) < KEPT_FAILURES:
                self.failures.append(record)
            if self._options.on_error == "raise":
                where = record.place or f"text {record.index}"
                raise TextsFailedError(f"{where} cannot be embedded: {record.error}")
        elif entry.cached:
            summary.cached += 1
        elif entry.is_duplicate:
            summary.duplicates += 1
        elif entry.is_computed:
            summary.embedded += 1
            summary.chunks += len(record.chunks)
            summary.tokens += record.n_tokens
        else:
            raise AssertionError("a text was neither computed nor found: this is a bug")

    def _hand_over(self, results: Sequence[Delivered]) -> None:
        if self._parts.want_results:
            self.results.put(results)
            return
        for entry, _ in results:
            self.release(entry)

    def _set_baseline(self) -> None:
        """When the first batch has run: what the model keeps for itself is no growth."""
        if not self._has_baseline and self._engine is not None and self._engine.statistics.batches > 0:
            self._has_baseline = True
            self._budget.set_baseline(self.admission.statistics().reserved_bytes)

    def _hasten_head(self) -> None:
        """The budget is full: brings the text that ordered delivery waits for into the next batch."""
        if self._order is None or self._client is None:
            return
        entry = self.in_flight.get(self._order.next_index)
        if entry is not None and entry.work is not None:
            self._client.hasten(entry.work)
