"""One small file for each model and device in the user's cache folder, and a note while a larger batch is tried.

The file appears whole or not at all, and one that is damaged is as good as none. A note is a file of its own with the
process that wrote it: found after that process has died, the batch it tells of was the last thing that it did. The
folder may be shared with other hosts and containers; a note is judged only where its process could be seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from asyncembed.cache import cache_folder
from asyncembed.limits import LearntLimit

logger = logging.getLogger("asyncembed")

_FORMAT = 1
_CLOCK_SLACK_S = 2.0
_DROP_NOTE_AFTER_S = 7 * 24 * 3600.0  # of another place; no batch takes so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What is kept of a model on a device.

    Attributes:
        learnt: The limit and the size, in padded tokens.
        largest: The largest batch in padded tokens that has run here; 0 if none has.
        bytes_per_token: What a padded token of it took while it ran; None if that was never measured.
        tuned_at: When the fastest size was found, in seconds since 1970; None if it was not.
        killed_on: When a run was killed last, in seconds since 1970; None if none was.
        deaths: How often a run was killed while one chunk ran and nothing beside it, by the digest of the chunk.
    """

    learnt: LearntLimit
    largest: int = 0
    bytes_per_token: float | None = None
    tuned_at: float | None = None
    killed_on: float | None = None
    deaths: Mapping[str, int] = field(default_factory=dict)


class Death(NamedTuple):
    """What a process that died had noted last.

    Attributes:
        n_tokens: Padded tokens of the batch.
        chunk: Digest of its chunk, if that was all that ran; else None.
    """

    n_tokens: int
    chunk: str | None


def limits_root() -> Path:
    """Where what was learnt is kept."""
    return cache_folder() / "limits"


class LimitFile:
    """The file of one model on one device. All that is blocking here takes a millisecond or so."""

    def __init__(self, facts: Mapping[str, Any], root: Path | None = None) -> None:
        self._facts = dict(facts)
        self._root = root if root is not None else limits_root()
        self._key = hashlib.sha256(json.dumps([_FORMAT, self._facts], sort_keys=True).encode()).hexdigest()[:40]
        self._note = self._root / f"{self._key}.{os.getpid()}-{uuid.uuid4().hex[:8]}.trial"
        self._warned = False

    def __repr__(self) -> str:
        return f"<LimitFile {self.path}>"

    @property
    def path(self) -> Path:
        """The file."""
        return self._root / f"{self._key}.json"

    def load(self) -> Remembered | None:
        """What is remembered; None if nothing is, or the file is damaged."""
        try:
            return _decode(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.info("what was learnt of batches cannot be read from %s (%s); it is learnt anew", self.path, error)
            return None

    def store(self, remembered: Remembered) -> None:
        """Keep it, in place of what was there. A cache that cannot be written is warned of once."""
        data = json.dumps({**self._facts, "remembered": _encode(remembered)}, indent=1).encode()
        temporary = self._note.with_suffix(".tmp")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(self.path)
        except OSError as error:
            self._cannot_write(error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def begin_trial(self, n_tokens: int, chunk: str | None = None) -> None:
        """Note that a batch of `n_tokens` padded tokens is about to run, flushed to the disk before this returns.

        `chunk` is the digest of its chunk where nothing else runs.
        """
        process = psutil.Process()
        note = {"n_tokens": n_tokens, "chunk": chunk, "pid": process.pid, "started": process.create_time(), **_place()}
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with self._note.open("wb") as file:
                file.write(json.dumps(note).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._cannot_write(error)

    def end_trial(self) -> None:
        """The batch of the note did not kill the process. Idempotent."""
        with contextlib.suppress(OSError):
            self._note.unlink(missing_ok=True)

    def take_deaths(self) -> list[Death]:
        """The batches that dead processes had noted; their notes are removed.

        A note of an earlier boot of this host is a death: the machine may have gone down with it. A note of another
        host, or of a container whose processes cannot be seen from here, is left alone, and dropped after a week.
        Of two processes that ask at once, only one is told of a note.
        """
        deaths: list[Death] = []
        here = _place()
        for note in self._root.glob(f"{self._key}.*.trial"):
            try:
                facts = json.loads(note.read_bytes())
                n_tokens, has_died = int(facts["n_tokens"]), _has_died(facts, here)
                if n_tokens < 1:
                    raise ValueError(f"{n_tokens} is no number of tokens")
                if has_died or (has_died is None and _age_s(note) > _DROP_NOTE_AFTER_S):
                    note.unlink()
                if has_died:
                    deaths.append(Death(n_tokens, _digest(facts.get("chunk"))))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError):
                if _age_s(note) > 60:  # of a process that died while it wrote it
                    with contextlib.suppress(OSError):
                        note.unlink()
        return deaths

    def _cannot_write(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("what is learnt of batches cannot be kept for the next run: %s", error)


def _place() -> dict[str, str | None]:
    """Where a process number means something: None for what this system does not tell."""
    boot = namespace = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace}


def _has_died(note: Mapping[str, Any], here: Mapping[str, str | None]) -> bool | None:
    """Whether the process of a note has ended; None if that cannot be known from here."""
    started = float(note["started"])
    # 1. another host   2. another boot: an earlier one, or a namesake of this host   3. another container   4. here
    if note["host"] != here["host"]:
        return None
    if note["boot"] != here["boot"]:
        return True if started < psutil.boot_time() else None
    if note["pid_namespace"] != here["pid_namespace"]:
        return None
    return not _is_alive(int(note["pid"]), started)


def _is_alive(pid: int, started: float) -> bool:
    """Whether the process of that number is still the one that started then: numbers are used again."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < _CLOCK_SLACK_S
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _encode(remembered: Remembered) -> dict[str, Any]:
    learnt = remembered.learnt
    return {
        "limit": learnt.limit,
        "failed_at": learnt.failed_at,
        "killed_at": learnt.killed_at,
        "fastest": learnt.fastest,
        "successes": learnt.successes,
        "largest": remembered.largest,
        "bytes_per_token": remembered.bytes_per_token,
        "tuned_at": remembered.tuned_at,
        "killed_on": remembered.killed_on,
        "deaths": dict(remembered.deaths),
    }


def _decode(data: Any) -> Remembered:
    found = data["remembered"]
    limit = _count(found["limit"])
    if limit is None:
        raise ValueError("there is no limit in it")
    learnt = LearntLimit(
        limit=limit,
        failed_at=_count(found["failed_at"]),
        killed_at=_count(found["killed_at"]),
        fastest=_count(found["fastest"]),
        successes=_count(found["successes"], least=0) or 0,
    )
    return Remembered(
        learnt=learnt,
        largest=_count(found["largest"], least=0) or 0,
        bytes_per_token=_amount(found["bytes_per_token"]),
        tuned_at=_amount(found["tuned_at"]),
        killed_on=_amount(found["killed_on"]),
        deaths={str(chunk): _count(times) or 1 for chunk, times in dict(found.get("deaths", {})).items()},
    )


def _count(value: Any, least: int = 1) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{value!r} is no number of tokens")
    return value


def _digest(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _amount(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no amount")
    return float(value)
