"""What the model runs next, and what becomes of a batch that failed: pure, without loop, clock or thread.

The asynchronous engine and the step-by-step class are two drivers of the same scheduler: what one retries, halves or
gives up, the other does alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from asyncembed.encoders.base import FloatMatrix
from asyncembed.encoders.failures import FailureKind
from asyncembed.engine.heap import ChunkHeap
from asyncembed.engine.work import Client, Work, add_vectors
from asyncembed.errors import KilledBeforeError, ModelError
from asyncembed.records import Batch, Chunk
from asyncembed.wording import plural

BROKEN_AFTER = 16
"""Chunks that fail alone, none passing between them, before it is asked whether the model is broken."""

INTERACTIVE = 0
BULK = 10
"""Classes of urgency: somebody waits for it, or a job that is in no hurry. Below `BULK` batches are small."""


class LimitEstimator(Protocol):
    """What the engine asks of a `TokenLimitEstimator` or its replacement."""

    def __call__(self) -> int:
        """The current limit of a batch in padded tokens."""
        ...

    def succeed(self, n_tokens: int, seconds: float | None = None) -> None:
        """A batch of so many padded tokens ran; None if it is no sample of the limit's speed."""
        ...

    def fail(self, n_tokens: int) -> None:
        """A batch of so many padded tokens ran out of memory."""
        ...


def current_limit(estimator: LimitEstimator) -> int:
    """The limit in padded tokens, at least 1 whatever a replaced estimator says."""
    return max(1, int(estimator()))


class EncoderState:
    """What is known of one of the encoders that share a scheduler.

    Attributes:
        estimator: The limit of its batches in padded tokens.
        max_rows: Most rows of a batch; None leaves it to the limit.
        pads: Rows are padded to the longest; if not, their lengths need not be alike.
        probe: A chunk that it took before, run again to find out whether the model is broken.
    """

    def __init__(self, estimator: LimitEstimator, max_rows: int | None = None, *, pads: bool = True) -> None:
        self.estimator = estimator
        self.max_rows = max_rows
        self.pads = pads
        self.probe: Batch | None = None
        self._probe_waits = False
        self._passed: Chunk | None = None
        self._failed_in_a_row = 0
        self._was_doubted = False

    def __repr__(self) -> str:
        return f"<EncoderState limit={self.limit}{' probing' if self.probe is not None else ''}>"

    @property
    def limit(self) -> int:
        """The limit of a batch in padded tokens."""
        return current_limit(self.estimator)

    def is_doubted(self) -> bool:
        """Whether other texts should run before more of those that fail, as none has passed yet. True once."""
        is_doubted = self._passed is None and self._failed_in_a_row >= BROKEN_AFTER // 2 and not self._was_doubted
        self._was_doubted = self._was_doubted or is_doubted
        return is_doubted

    def take_probe(self) -> Batch | None:
        """The probe, if one waits to be run."""
        waits, self._probe_waits = self._probe_waits, False
        return self.probe if waits else None

    def passed(self, batch: Batch) -> bool:
        """Learns that a batch ran; whether it was the probe."""
        is_probe, self._failed_in_a_row = batch is self.probe, 0
        if is_probe:
            self.probe = None
        else:
            self._passed = batch.chunks[0]
        return is_probe

    def failed_alone(self, error: BaseException | None) -> None:
        """Counts a chunk that failed alone: bad texts may come in a row, and a chunk that passed before tells."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= BROKEN_AFTER and self.probe is None:
            if self._passed is None:
                raise broken_model(error)
            self.probe, self._probe_waits = Batch((self._passed,)), True


class Scheduler:
    """Chooses batches from the heap and from what is left of batches that failed.

    Attributes:
        is_interactive: Somebody may wait for an answer: what is more urgent than `BULK` runs in small batches, and no
            batch is chosen before the model can take it.
    """

    def __init__(self, *, is_interactive: bool = False) -> None:
        self.is_interactive = is_interactive
        self.heap = ChunkHeap(interactive_below=BULK if is_interactive else 0)
        self._retries: deque[Batch] = deque()  # parts of batches that failed
        self._retry_waited = False
        self._second_chance: set[Chunk] = set()

    def __bool__(self) -> bool:
        return bool(self._retries or self.heap)

    def __repr__(self) -> str:
        return f"<Scheduler retries={len(self._retries)} {self.heap!r}>"

    def push(self, works: Iterable[Work]) -> None:
        """Lets the chunks of texts wait."""
        self.heap.push(works)

    def next_batch(self, encoder: EncoderState, n_idle: int = 1) -> Batch | None:
        """The encoder's probe, a part of a batch that failed, or the heap's choice; None if nothing may run.

        Where several slots of the model are idle, a new batch is the smaller: they share what waits.
        """
        share = max(1, -(-self.heap.n_tokens // n_idle)) if n_idle > 1 else None
        limit, max_rows, pads = encoder.limit, encoder.max_rows, encoder.pads
        return (
            encoder.take_probe()
            or (self.heap.take(limit, max_rows, pads=pads) if encoder.is_doubted() else None)
            or self._next_retry(encoder)
            or self.heap.take(limit, max_rows, share=share, pads=pads)
        )

    def may_choose_ahead(self, encoder: EncoderState) -> bool:
        """Whether a batch may be chosen before the model can take it: nobody is held up by it, and it is a good one.

        On two cores it gives OpenVINO 4 % of its speed on docstrings. To choose it anew when more arrives gives none.
        """
        return not self.is_interactive and self.heap.is_deep(encoder.limit, encoder.max_rows)

    def drop(self, works: Sequence[Work]) -> None:
        """Nobody waits for these texts of one client any more: drops them before they cost anything."""
        for work in works:
            work.is_open = False
            self._second_chance.difference_update(work.chunks)
        self.heap.discard(works)

    def stop(self, client: Client) -> None:
        """None of a client's texts is wanted any more."""
        client.is_stopped = True
        self._second_chance = {chunk for chunk in self._second_chance if chunk.work.client is not client}
        self.heap.discard_client(client)

    def succeeded(self, encoder: EncoderState, batch: Batch, vectors: FloatMatrix) -> list[Work]:
        """Takes the vectors of a batch, shape `(rows, dim)` float32.

        The limit is told by the driver, which knows how long the batch took.

        Returns:
            The texts that are done now. A probe's vectors are of no use.
        """
        if encoder.passed(batch):
            return []
        self._second_chance.difference_update(batch.chunks)
        return self._without_waiting(add_vectors(batch.chunks, vectors))

    def failed(self, encoder: EncoderState, batch: Batch, kind: FailureKind, error: BaseException | None) -> list[Work]:
        """Learns that a batch failed; its chunks are tried again, but for one that is given up: its text, failed."""
        # 1. The device is dead: stop. 2. A probe: the model is broken. 3. Out of memory: a lower limit, and the batch
        # in parts. 4. Anything else may be one text's fault: find it by halving.
        if isinstance(error, ModelError) and kind is not FailureKind.OUT_OF_MEMORY:
            raise error
        if kind is FailureKind.FATAL:
            raise ModelError(f"the device cannot go on: {error}") from error
        if batch is encoder.probe:
            encoder.probe = None
            raise broken_model(error)
        if kind is FailureKind.OUT_OF_MEMORY:
            encoder.estimator.fail(batch.padded_tokens)
        if len(batch.chunks) > 1:
            self._retries.extendleft(reversed(batch.halves()))
            return []
        chunk = batch.chunks[0]
        reason = self._why_given_up(encoder, chunk, kind, error)
        work: Work = chunk.work
        if reason is None or not work.is_open:
            return []
        work.fail(reason)
        return self._without_waiting([work])

    def _without_waiting(self, done: list[Work]) -> list[Work]:
        """The texts; what still waits of those that failed is dropped."""
        for work in done:
            if work.error is not None and len(work.chunks) > 1:
                self.heap.discard([work])
        return done

    def _next_retry(self, encoder: EncoderState) -> Batch | None:
        """The next part of a batch that failed; None if there is none, or something more urgent goes between two."""
        while self._retries:
            batch = self._wanted_of(self._retries[0])
            urgent = self.heap.most_urgent()
            if batch is not None and urgent is not None and urgent < priority_of(batch) and not self._retry_waited:
                self._retry_waited = True
                return None
            self._retries.popleft()
            if batch is None:
                continue
            self._retry_waited = False
            while len(batch.chunks) > 1 and batch.padded_tokens > encoder.limit:
                batch, rest = batch.halves()
                self._retries.appendleft(rest)
            return batch
        return None

    def _wanted_of(self, batch: Batch) -> Batch | None:
        """The batch without chunks that nobody waits for any more; None if none is left."""
        if all(chunk.work.is_wanted for chunk in batch.chunks):
            return batch
        wanted = [row for row, chunk in enumerate(batch.chunks) if chunk.work.is_wanted]
        self._second_chance.difference_update(chunk for chunk in batch.chunks if not chunk.work.is_wanted)
        return batch.part(wanted) if wanted else None

    def _why_given_up(
        self, encoder: EncoderState, chunk: Chunk, kind: FailureKind, error: BaseException | None
    ) -> str | None:
        """Why a chunk that failed alone is not tried again; None if it is."""
        if kind is FailureKind.OUT_OF_MEMORY:
            # Once more, after what waits: memory that a neighbour or an earlier failure holds may be free by then.
            if chunk not in self._second_chance:
                self._second_chance.add(chunk)
                self._retries.append(Batch((chunk,)))
                return None
            self._second_chance.discard(chunk)
            return f"a chunk of {plural(chunk.length, 'token')} does not fit into memory even alone"
        if isinstance(error, KilledBeforeError):  # says nothing about the model
            return str(error)
        encoder.failed_alone(error)
        return f"the model failed on it: {type(error).__name__}: {error}"


def priority_of(batch: Batch) -> int:
    """The class of the most urgent text in a batch."""
    urgent: int = min(chunk.work.priority for chunk in batch.chunks)
    return urgent


def broken_model(error: BaseException | None) -> ModelError:
    """The model is at fault, and not the texts it failed on."""
    broken = ModelError(
        f"the model failed on {BROKEN_AFTER} chunks in a row, each alone, "
        f"the last time with: {type(error).__name__}: {error}"
    )
    broken.__cause__ = error
    return broken
