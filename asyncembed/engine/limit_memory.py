"""Remembers what an estimator learns for the next run, and notes the batches that are larger than any before.

There is one small file for each model and device in the user's cache folder; one that is damaged is as good as none. A
note is a file of its own, with the process that wrote it: found after that process has died, the batch it tells of was
the last thing that it did. The folder may be shared with other hosts; a note is judged only by its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import psutil

from asyncembed.cache import cache_folder, write_small
from asyncembed.encoders.base import Encoder, pads_rows
from asyncembed.engine.limits import LearntLimit, estimator_for
from asyncembed.engine.memory import available_bytes, memory_bound, peak_rss_bytes, rss_bytes
from asyncembed.errors import KilledBeforeError
from asyncembed.records import Batch

logger = logging.getLogger("asyncembed")

RETUNE_AFTER_S = 30 * 86_400
"""The fastest size is searched for again after so long: drivers and libraries change."""

FORGET_KILL_AFTER_S = 7 * 86_400
"""A size that a run was killed for is doubted after so long: it may have been a neighbour's fault, or a person's."""

LARGER = 1.04
"""A batch is larger than any before if it is by so much: a handful of notes is written and not a hundred."""

LOOK_EVERY = 32
"""Batches between two looks at how much memory is free."""

DEATHS_TO_GIVE_UP = 2
"""A chunk that ran alone at so many deaths fails its text: one death may be a neighbour's fault, or a person's."""

MEMORY_STEP = 64 << 20
"""The machine's memory is told apart in such steps; kernels differ by a few pages from boot to boot."""

_FORMAT = 1
_CLOCK_SLACK_S = 2.0
_DAMAGED = (ValueError, KeyError, TypeError, OverflowError)


@dataclass(slots=True)
class _Known:
    """What is remembered of a model on a device; sizes are in padded tokens, times in seconds since 1970."""

    learnt: LearntLimit | None = None
    largest: int = 0  # the largest batch that has run here
    bytes_per_token: float | None = None  # what a padded token of it took while it ran
    tuned_at: float | None = None  # when the fastest size was found
    killed_on: float | None = None  # when a run was killed last
    deaths: dict[str, int] = field(default_factory=dict)  # how often, while a chunk ran alone, by its digest


class LimitMemory:
    """The estimator of a run, begun with what earlier runs learnt, and what is to be told of each batch.

    A batch is told of in the model's thread, with what the estimator has learnt by then: it belongs to the event loop.
    With a `token_limit` of the user's own nothing is remembered (`is_kept`). The disk is touched only when a batch is
    larger than any that has run on this machine, or when something was learnt that the next run should know.
    """

    def __init__(
        self,
        encoder: Encoder,
        token_limit: int | None = None,
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.encoder = encoder
        self.is_kept = token_limit is None
        self._clock = clock
        self._facts = _facts_of(encoder)
        key = hashlib.sha256(json.dumps([_FORMAT, self._facts], sort_keys=True).encode()).hexdigest()[:40]
        self.path = (folder if folder is not None else cache_folder() / "limits") / f"{key}.json"
        self._note = self.path.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex[:8]}.trial")
        self._has_warned = False
        self._known = _Known()
        if self.is_kept:
            self._load()
            self._learn_deaths()
        learnt, slots, pads = self._known.learnt, encoder.slots, pads_rows(encoder)
        self.estimator = estimator_for(encoder.device, token_limit, learnt=learnt, slots=slots, pads=pads)
        self._shares_memory = encoder.device.split(":")[0] in ("cpu", "mps")
        self._learnt = self.estimator.learnt()
        self._trial: int | None = None
        self._before = (0, 0)  # resident memory and its peak when the trial began
        self._n_batches = 0
        self._look()

    def __repr__(self) -> str:
        return f"<LimitMemory {self.estimator!r} largest={self._known.largest} {self.path}>"

    def suspect(self, batch: Batch) -> str | None:
        """The digest of a batch's only chunk if a run was killed in a batch no larger: such a chunk runs alone.

        Raises:
            KilledBeforeError: It ran alone at two deaths, and would kill every run.
        """
        killed_at = self._learnt.killed_at
        if len(batch.chunks) > 1 or (killed_at is None and not self._known.deaths):
            return None
        chunk = hashlib.sha256(batch.chunks[0].ids.tobytes()).hexdigest()[:32]
        if self._known.deaths.get(chunk, 0) >= DEATHS_TO_GIVE_UP:
            raise KilledBeforeError(batch.padded_tokens)
        return chunk if killed_at is not None and batch.padded_tokens >= killed_at else None

    def survived(self, chunk: str) -> None:
        """Forgets the deaths of a chunk that has run alone: they were not its fault."""
        self._known.deaths.pop(chunk, None)

    def before(self, n_tokens: int, learnt: LearntLimit, chunk: str | None = None) -> None:
        """Notes a batch of `n_tokens` padded tokens that is larger than any before; `chunk` is one that runs alone.

        The note is flushed to the disk before this returns.
        """
        self._learnt, known = learnt, self._known.learnt
        # The next run should know it at once, and not only if this one ends well.
        if (learnt.failed_at, learnt.fastest) != ((known.failed_at, known.fastest) if known else (None, None)):
            self.save()
        self._n_batches += 1
        if self._n_batches % LOOK_EVERY == 0:
            self._look()
        if n_tokens <= max(LARGER * self._known.largest, self._trial or 0):
            return
        self._trial = n_tokens
        if self._shares_memory:  # elsewhere memory that runs out is an exception
            process = psutil.Process()
            note = {"n_tokens": n_tokens, "chunk": chunk, "pid": process.pid, "started": process.create_time()}
            self._write(self._note, {**note, "host": socket.gethostname()}, flush=True)
            self._before = (rss_bytes(), peak_rss_bytes())

    def after(self, n_tokens: int, error: BaseException | None = None) -> None:
        """Removes the note of a batch that has run, or ended in an error: the process survived it."""
        if self._trial is None or n_tokens < self._trial:
            return
        if error is None:
            self._known.largest = n_tokens
            peak = peak_rss_bytes()
            if self._shares_memory and peak > max(self._before):
                self._known.bytes_per_token = (peak - self._before[0]) / n_tokens
                self._look()
            self.save()  # first: a note may outlive the batch, but must not be gone before it is known to have run
        self._end_trial()

    def save(self) -> None:
        """Keep what is known now."""
        if not self.is_kept:
            return
        known, learnt = self._known, self._learnt
        before, known.learnt = known.learnt, learnt
        if learnt.fastest is None:
            known.tuned_at = None
        elif not learnt.is_old and (before is None or before.is_old or before.fastest != learnt.fastest):
            known.tuned_at = self._clock()
        if learnt.killed_at is None:
            known.killed_on = None
        if learnt.fastest or learnt.failed_at or learnt.killed_at or known.largest:
            self._store()

    def close(self) -> None:
        """The run is over: keep what it learnt, and withdraw its note. It may be used again."""
        self._learnt = self.estimator.learnt()
        self.save()
        self._end_trial()

    def _end_trial(self) -> None:
        self._trial = None
        with suppress(OSError):
            self._note.unlink(missing_ok=True)

    def _load(self) -> None:
        """Reads what earlier runs left, without what is too old."""
        try:
            data = json.loads(self.path.read_bytes())
            remembered = data["remembered"]
            if data["digest"] != _digest(remembered):
                raise ValueError("it is damaged")
            known = _Known(**remembered)
            learnt = LearntLimit(**remembered["learnt"])
        except FileNotFoundError:
            return
        except (OSError, *_DAMAGED) as error:
            logger.info("what was learnt of batches cannot be read from %s (%s); it is learnt anew", self.path, error)
            return
        now = self._clock()
        if not 0 <= now - (known.killed_on or inf) < FORGET_KILL_AFTER_S:
            learnt = replace(learnt, killed_at=None)
        is_old = not 0 <= now - (known.tuned_at or inf) < RETUNE_AFTER_S
        known.learnt, self._known = replace(learnt, is_old=is_old), known

    def _learn_deaths(self) -> None:
        """Learn from the notes of processes that died, and remove these.

        A note of another host is left alone, and dropped after a week: no batch takes so long. Of two processes that
        look at once, only one is told of a note.
        """
        known, killed_at = self._known, list[int]()
        for note in self.path.parent.glob(f"{self.path.stem}.*.trial"):
            death = None
            try:
                with suppress(*_DAMAGED):
                    death = _death_in(json.loads(note.read_bytes()))
                    if death is None and self._clock() - note.stat().st_mtime < FORGET_KILL_AFTER_S:
                        continue
                note.unlink()
            except OSError:
                continue
            if death is not None:
                n_tokens, chunk = death
                killed_at.append(n_tokens)
                if chunk is not None:
                    known.deaths[chunk] = known.deaths.get(chunk, 0) + 1
        if killed_at:
            smallest = min(killed_at)
            known.learnt = (known.learnt or LearntLimit(limit=smallest)).after_kill(smallest)
            known.largest = min(known.largest, int((smallest - 1) / LARGER))
            known.killed_on = self._clock()
            self._store()

    def _store(self) -> None:
        """Writes the file, in place of what was there."""
        remembered = asdict(self._known)
        self._write(self.path, {**self._facts, "remembered": remembered, "digest": _digest(remembered)})

    def _write(self, path: Path, data: Mapping[str, Any], *, flush: bool = False) -> None:
        """Write a file. A cache that cannot be written is warned of once."""
        try:
            write_small(path, json.dumps(data, indent=1).encode(), flush=flush)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("what is learnt of batches cannot be kept for the next run: %s", error)

    def _look(self) -> None:
        """Keeps batches to half of the free memory, where running out of it is a kill; neighbours take of the rest."""
        per_token = self._known.bytes_per_token
        if self._shares_memory and per_token is not None:
            self.estimator.keep_below(int(available_bytes() / (2 * self.encoder.slots * per_token)))


def _facts_of(encoder: Encoder) -> dict[str, Any]:
    """What decides about an encoder's batches: the model, what runs it, and on what machine."""
    device_memory = ""
    if encoder.device.startswith("cuda"):
        import torch

        facts = torch.cuda.get_device_properties(torch.device(encoder.device))
        device_memory = f"{facts.name} {facts.total_memory}"
    return {
        "model": str(Path(encoder.name).resolve()) if os.path.isdir(encoder.name) else encoder.name,
        "dim": encoder.dim,
        "max_tokens": encoder.max_tokens,
        "backend": encoder.backend,
        "dtype": encoder.dtype,
        "device": encoder.device,
        "device_memory": device_memory,
        "cpus": os.cpu_count(),
        "memory": memory_bound() // MEMORY_STEP * MEMORY_STEP,
    }


def _digest(remembered: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(remembered, sort_keys=True).encode()).hexdigest()[:16]


def _death_in(note: Any) -> tuple[int, str | None] | None:
    """The tokens of a note's batch and its chunk, if its process has died here; else None."""
    n_tokens, chunk, pid, started = int(note["n_tokens"]), note["chunk"], int(note["pid"]), float(note["started"])
    if note["host"] != socket.gethostname():
        return None
    # A process's number is used again: only one that started then is the same.
    with suppress(psutil.NoSuchProcess):
        try:
            if abs(psutil.Process(pid).create_time() - started) < _CLOCK_SLACK_S:
                return None
        except psutil.AccessDenied:
            return None
    return n_tokens, chunk
