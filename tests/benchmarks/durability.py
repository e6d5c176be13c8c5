"""What `durability="power"` costs: files saved a second both ways, in turns.

`python -m tests.benchmarks.durability FOLDER` writes into a new folder below FOLDER: it decides which disk is measured.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from statistics import median

import numpy as np

from asyncembed.records import EmbeddedChunk, EmbeddedText, text_id
from asyncembed.store.files import StorePaths
from asyncembed.store.writer import FolderWriter

DIM = 384
N_FILES = 1024
ROUNDS = 5


def records(n: int) -> list[EmbeddedText]:
    """Texts of one chunk with a vector each."""
    vectors = np.random.default_rng(0).standard_normal((n, DIM)).astype(np.float32)
    found = []
    for number, vector in enumerate(vectors):
        text = f"The text of row {number}"
        found.append(EmbeddedText(text_id(text), number, None, text, vector, (EmbeddedChunk(text, 0, 6, vector),), 6))
    return found


def files_per_second(parent: str, size: int, durable: bool) -> float:
    """Commit all records in micro-batches of one size into a new folder."""
    folder = tempfile.mkdtemp(dir=parent)
    writer = FolderWriter(StorePaths.of(folder), durable=durable)
    writer.open()
    writer.claim({"dim": DIM}, {})
    todo = records(N_FILES)
    started = time.perf_counter()
    for at in range(0, N_FILES, size):
        writer.commit(todo[at : at + size])
    seconds = time.perf_counter() - started
    writer.close()
    shutil.rmtree(folder)
    return N_FILES / seconds


def main() -> None:
    """Print the medians."""
    for size in (64, 256):
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for durable, speeds in found.items():
                speeds.append(files_per_second(sys.argv[1], size, durable))
        process, power = median(found[False]), median(found[True])
        print(f"micro-batches of {size}: process {process:,.0f} files/s, power {power:,.0f} files/s")


if __name__ == "__main__":
    main()
