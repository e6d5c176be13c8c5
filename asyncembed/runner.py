"""The work of the model's thread: batches in, outcomes out."""

from __future__ import annotations

import time
import traceback
from collections import deque
from dataclasses import dataclass

import numpy as np

from asyncembed.encoders.base import Encoder, FloatMatrix
from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.errors import ModelError
from asyncembed.records import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a batch in the model's thread.

    Attributes:
        batch: The batch.
        vectors: Shape `(rows, dim)` float32; None if it failed.
        seconds: From the end of the batch before it, or from its own start if the model was idle then, to its end.
            Of batches that overlap the sum over all is the time that the model was busy.
        kind: What kind of failure it was.
        error: The failure.
    """

    batch: Batch
    vectors: FloatMatrix | None
    seconds: float
    kind: FailureKind | None = None
    error: BaseException | None = None


class ModelRunner:
    """The work of the model's thread: batches in, outcomes out, as many under way as the encoder has slots."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._under_way: deque[tuple[Batch, object, float]] = deque()
        self._fatal: Exception | None = None
        self._n_passed = 0
        self._ended = 0.0

    def advance(self, batch: Batch | None) -> Outcome | None:
        """Start `batch`, and finish one under way if all slots are taken or there is nothing to start.

        That is the oldest of the most urgent: a device that runs several batches at once is soon done with a small
        urgent one, which must not wait for large ones that began before it. The oldest of all is passed by no more
        often than there are slots.
        """
        if batch is not None:
            started = time.perf_counter()
            if self._fatal is not None:  # the device's context is dead: nothing it would give can be trusted
                return Outcome(batch, None, 0.0, FailureKind.FATAL, self._fatal)
            try:
                handle = self._encoder.start(batch)
            except Exception as error:
                failed = error
            else:
                self._under_way.append((batch, handle, started))
                if len(self._under_way) < self._encoder.slots:
                    return None
                return self._finish_next()
            return self._failure(batch, failed, started)
        return self._finish_next() if self._under_way else None

    def _choose(self) -> int:
        """The place of the batch to finish."""
        if self._n_passed >= self._encoder.slots:
            return 0
        urgency = [min(chunk.priority for chunk in batch.chunks) for batch, _, _ in self._under_way]
        return urgency.index(min(urgency))

    def _finish_next(self) -> Outcome:
        place = self._choose()
        self._n_passed = self._n_passed + 1 if place else 0
        batch, handle, started = self._under_way[place]
        del self._under_way[place]
        try:
            vectors = np.asarray(self._encoder.finish(handle), np.float32)
            if vectors.shape[:1] != (len(batch.chunks),) or vectors.ndim != 2:
                raise ModelError(f"the encoder returned shape {vectors.shape} for {len(batch.chunks)} rows")
        except Exception as error:
            failed = error
        else:
            return Outcome(batch, vectors, self._end(started))
        del handle
        return self._failure(batch, failed, started)

    def _failure(self, batch: Batch, error: Exception, started: float) -> Outcome:
        """Called outside the `except` block, whose traceback would keep the batch's tensors alive."""
        kind = FailureKind.FATAL if isinstance(error, ModelError) else classify(error)
        if kind is FailureKind.FATAL:
            self._fatal = error
        if kind is FailureKind.OUT_OF_MEMORY:
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = error.__context__ = error.__cause__ = None
            try:
                self._encoder.free_memory()
            except Exception as failed:  # the device may be beyond help: what it says then counts
                if classify(failed) is FailureKind.FATAL:
                    self._fatal, kind, error = failed, FailureKind.FATAL, failed
        return Outcome(batch, None, self._end(started), kind, error)

    def _end(self, started: float) -> float:
        """Seconds of a batch that ends now."""
        begun, self._ended = max(started, self._ended), time.perf_counter()
        return self._ended - begun
