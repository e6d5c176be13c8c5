"""`--fuzz N`: N damaged inputs for the readers of every format and for the files of the store."""

from __future__ import annotations

import faulthandler
import json
import random
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT
from tests.fuzzing import SEEDS, check_reader, check_store, damaged, folder_seed, mutated, write_folder
from tests.soak.figures import Figures

CHUNK = 10_000
"""Inputs of one process: one that hangs takes no more with it."""

HANG_S = 60
"""Seconds after which a hundred inputs are said to hang."""

STORE_SHARE = 5
"""Every fifth input is a folder of the store."""

_KEPT = 20


def storm(n_inputs: int, seed: int, work: Path) -> Iterator[Figures]:
    """Feed damaged inputs, in processes of their own.

    Args:
        n_inputs: How many.
        seed: Of the damage.
        work: A folder for the store's files.
    """
    counts: Counter[str] = Counter()
    broken: list[str] = []
    for first in range(0, n_inputs, CHUNK):
        n = min(CHUNK, n_inputs - first)
        arguments = [str(first), str(n), str(seed), str(work / str(first))]
        done = subprocess.run(
            [sys.executable, "-m", "tests.soak.fuzz", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            counts["hangs"] += 1
            broken.append(f"inputs {first} to {first + n}: {done.stderr[-2000:]}")
            continue
        found = json.loads(done.stdout)
        counts.update(found["counts"])
        broken.extend(found["broken"])
    figures = {"inputs": n_inputs} | {
        name: counts[name]
        for name in ("read whole", "clean error", "store inputs", "tracebacks", "silent skips", "hangs")
    }
    yield Figures("damaged files, for the readers and the store", figures, tuple(broken[:_KEPT]))


def feed(first: int, n: int, seed: int, work: Path) -> dict[str, object]:
    """Feed inputs `first` to `first + n`; each depends on the seed and its number alone."""
    counts: Counter[str] = Counter()
    broken: list[str] = []
    folders = [folder_seed(work / name, killed=name == "killed") for name in ("clean", "killed")]
    for number in range(first, first + n):
        if number % 100 == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            counts[_one(number, seed, folders, work / "folder", counts)] += 1
        except AssertionError as error:
            counts["silent skips"] += 1
            broken.append(f"input {number} of seed {seed}: {str(error)[:500]}")
        except Exception:
            counts["tracebacks"] += 1
            broken.append(f"input {number} of seed {seed}: {traceback.format_exc()[-1500:]}")
    faulthandler.cancel_dump_traceback_later()
    return {"counts": counts, "broken": broken[:_KEPT]}


def _one(number: int, seed: int, folders: list[dict[str, bytes]], work: Path, counts: Counter[str]) -> str:
    rng = random.Random(f"{seed}-{number}")
    if number % STORE_SHARE == 0:
        counts["store inputs"] += 1
        write_folder(work, damaged(rng.choice(folders), rng))
        return check_store(work)
    form = rng.choice(list(SEEDS))
    return check_reader(form, mutated(rng.choice(SEEDS[form]), rng), as_pipe=rng.random() < 0.3)


if __name__ == "__main__":
    print(json.dumps(feed(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
