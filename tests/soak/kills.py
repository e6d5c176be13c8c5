"""Real jobs of the default model, killed at random instants and random writes, and started again until done."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from asyncembed import open_embeddings, text_id
from tests.conftest import ROOT
from tests.soak.figures import Figures

N_TEXTS = 1500
COMMIT_RECORDS = 256
"""What a kill may cost at most, beside the batches under way: one micro-batch of the writer."""

MOST_ROWS = 64
"""Rows of a batch here, so that what is in flight is known: two batches run and one is prepared."""

STEPS_OF_A_TEXT = 4
"""Open, two halves of a write, rename."""

STEPS_OF_A_JOB = 30
"""Lock, ledger, index."""

AGREE = 0.999999
TOLERANCE = COMMIT_RECORDS + 3 * MOST_ROWS


@dataclass(slots=True)
class Count:
    """What the storm has seen so far."""

    kills: int = 0
    jobs: int = 0
    lost: int = 0
    torn: int = 0
    again: int = 0
    doubled: int = 0
    most_in_flight: int = 0
    before_model: int = 0
    in_a_write: int = 0
    lowest_cosine: float = 1.0
    broken: list[str] = field(default_factory=list)


def storm(n_kills: int, seed: int, work: Path) -> Iterator[Figures]:
    """Kill jobs `n_kills` times, each job again and again until it is done, and compare with an undisturbed one."""
    work.mkdir(parents=True)
    chance = random.Random(seed)
    source = work / "texts.txt"
    source.write_text("".join(f"{line}\n" for line in _texts(chance)), encoding="utf-8")
    ids = [text_id(line) for line in source.read_text(encoding="utf-8").splitlines()]
    calm = work / "calm"
    _run(source, calm)  # may have to make the graph first
    shutil.rmtree(calm)
    started = time.monotonic()
    if _run(source, calm) != 0:
        raise RuntimeError("the undisturbed run failed: the storm would prove nothing")
    whole_s = time.monotonic() - started
    expected = dict(zip(*open_embeddings(calm).to_numpy(), strict=True))
    count = Count()
    while count.kills < n_kills and not count.broken:
        _one_job(source, ids, work / "job", expected, chance, count, n_kills, whole_s)
    yield Figures(
        "kill -9 at random instants and random writes",
        {
            "kills": count.kills,
            "jobs": count.jobs,
            "texts a job": len(ids),
            "before the model was ready": count.before_model,
            "with a file half written": count.in_a_write,
            "lost": count.lost,
            "torn": count.torn,
            "doubled beyond what was in flight": count.doubled,
            "computed again": count.again,
            "most in flight": count.most_in_flight,
            "lowest cosine": f"{count.lowest_cosine:.8f}",
        },
        tuple(count.broken),
    )


def _texts(chance: random.Random) -> list[str]:
    """Distinct short texts."""
    words = ("boat", "harbour", "storm", "river", "heron", "winter", "garden", "letter", "mountain", "bridge")
    return [f"{n}: " + " ".join(chance.choices(words, k=chance.randint(2, 14))) for n in range(N_TEXTS)]


def _run(source: Path, folder: Path, kill_after_s: float | None = None, kill_at: int = 0) -> int:
    """The job's exit code; negative if it was killed, after some seconds or at one step of what it writes."""
    command = [sys.executable, "-m", "tests.soak.killed", str(_log(folder)), str(kill_at), str(source)]
    command += ["-o", str(folder)]
    command += ["--quiet", "--batch-size", str(MOST_ROWS)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        try:
            _, errors = child.communicate(timeout=kill_after_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            _, errors = child.communicate()
    if child.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a job that was started again ended with {child.returncode}: {errors}")
    return child.returncode


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _one_job(
    source: Path,
    ids: list[str],
    folder: Path,
    expected: dict[str, np.ndarray],
    chance: random.Random,
    count: Count,
    n_kills: int,
    whole_s: float,
) -> None:
    """Start a job, kill it at a random instant before its expected end, start it again, until it is done."""
    shutil.rmtree(folder, ignore_errors=True)
    _log(folder).unlink(missing_ok=True)
    count.jobs += 1
    saved: set[str] = set()
    n_logged = 0
    over = False
    while not over:
        # 1. enough kills   2. at a random instant   3. at a random step of the writing that is left to do
        if count.kills >= n_kills:
            over = _run(source, folder) == 0
        elif count.kills % 2:
            over = _run(source, folder, kill_after_s=chance.uniform(0.05, whole_s)) == 0
        else:
            n_steps = STEPS_OF_A_TEXT * (len(ids) - len(saved)) + STEPS_OF_A_JOB
            over = _run(source, folder, kill_at=chance.randint(1, n_steps)) == 0
        computed = _log(folder).read_text().split() if _log(folder).exists() else []
        now, n_logged = computed[n_logged:], len(computed)
        count.kills += not over
        saved = _look(folder, saved, now, count, over)
        in_flight = len(set(now) - saved)
        count.most_in_flight = max(count.most_in_flight, in_flight)
        if in_flight > TOLERANCE:
            count.broken.append(f"{in_flight} texts were computed and not saved; promised are {TOLERANCE}")
    count.again += len(computed) - len(set(computed))
    _verify(folder, ids, expected, count)


def _look(folder: Path, before: set[str], now: list[str], count: Count, over: bool) -> set[str]:
    """The texts whose file is there, each read; what was there before has to be, and not to be computed again."""
    saved: set[str] = set()
    for path in (folder / "embeddings_data").glob("*.json"):
        try:
            found = json.loads(path.read_bytes())["id"]
        except ValueError:
            found = ""
        if found != path.stem:
            count.torn += 1
            count.broken.append(f"{path.name} is torn")
        saved.add(path.stem)
    lost = before - saved
    doubled = len(before & set(now)) + sum(n - 1 for n in Counter(now).values())
    count.lost += len(lost)
    count.doubled += doubled
    if lost:
        count.broken.append(f"{len(lost)} saved texts were gone after a kill")
    if doubled:
        count.broken.append(f"{doubled} texts were computed that were saved, or twice in one run")
    if not over:
        count.before_model += not now
        count.in_a_write += any(folder.rglob("*.tmp"))
    return saved


def _verify(folder: Path, ids: list[str], expected: dict[str, np.ndarray], count: Count) -> None:
    """A job that is done has every text, an index that says so, and the vectors of an undisturbed run."""
    stored = open_embeddings(folder)
    found, matrix = stored.to_numpy()
    missing = set(ids) - set(found)
    count.lost += len(missing)
    if missing:
        count.broken.append(f"{len(missing)} texts are missing when all is done")
    index = json.loads((folder / "embeddings_index.json").read_bytes())
    if set(index["texts"]) != set(found) or any(folder.rglob("*.tmp")) or any(folder.glob("*-wal")):
        count.broken.append("the index of a finished job is not that of its files")
    for identity, vector in zip(found, matrix, strict=True):
        other = expected[identity]
        cosine = float(vector @ other / np.linalg.norm(vector) / np.linalg.norm(other))
        count.lowest_cosine = min(count.lowest_cosine, cosine)
    if count.lowest_cosine < AGREE:
        count.broken.append(f"a vector agrees with the undisturbed run's only to {count.lowest_cosine:.8f}")
