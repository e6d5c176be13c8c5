"""What a person waits for: the start of a whole process, and the way over texts that are done already."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncembed
from asyncembed import EmbedOptions, EmbedStream, read_texts
from asyncembed.encoders.loading import model_folder
from asyncembed.job import JobParts
from tests.benchmarks.comparison import Say
from tests.benchmarks.measure import interleaved, speed
from tests.fakes import FakeEncoder

ROOT = Path(asyncembed.__file__).parents[1]
FIRST_SAVED = "the first results are saved"
FIRST_VECTOR = "the first vector"
SCRIPT = f"""\
import sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device=sys.argv[2])
model.encode("How long does it take to begin?")
print("{FIRST_VECTOR}", file=sys.stderr, flush=True)
"""


def startup(model: str, device: str, corpus: Path, work: Path, n_rounds: int, say: Say) -> list[dict[str, Any]]:
    """Seconds from typing a command to its first result, of whole processes in turns.

    The first run of each does not count: it fills the disk's cache, and lets the model be converted where it will be.
    A line that the process writes tells the moment; nothing is polled.

    Args:
        model: A name or a folder.
        device: Where it runs.
        corpus: A file of texts.
        work: A folder for what they write.
        n_rounds: Turns of each.
        say: Is told of each turn.
    """
    program = [sys.executable, "-m", "asyncembed", str(corpus), "-v", "-m", model, "-d", device]
    script = [sys.executable, "-c", SCRIPT, str(model_folder(model) or model), device]
    commands = {
        "asyncembed, to the first file": (program, FIRST_SAVED),
        "asyncembed --backend torch, to the first file": ([*program, "--backend", "torch"], FIRST_SAVED),
        "script with SentenceTransformer, to the first vector": (script, FIRST_VECTOR),
    }
    firsts: dict[str, list[float]] = {name: [] for name in commands}
    totals: dict[str, list[float]] = {name: [] for name in commands}
    for number, name in enumerate(interleaved(list(commands), 1 + n_rounds)):
        command, words = commands[name]
        folder = work / f"startup-{number}"
        first_s, total_s = _time_to(words, [*command, "-o", str(folder)] if words == FIRST_SAVED else command, folder)
        if number >= len(commands):
            firsts[name].append(first_s)
            totals[name].append(total_s)
        say(f"startup: {name} {first_s:.2f} s")
    return [
        {
            "name": name,
            "first_s": statistics.median(firsts[name]),
            "total_s": statistics.median(totals[name]),
            "seconds": firsts[name],
        }
        for name in commands
    ]


def _time_to(words: str, command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds until a process writes a line with these words to its standard error, and until it ends."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    started, first_s = time.perf_counter(), None
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        if process.stderr is None:
            raise AssertionError("a pipe was asked for: this is a bug")
        said = ""
        for line in process.stderr:
            said += line
            if first_s is None and words in line:
                first_s = time.perf_counter() - started
    total_s = time.perf_counter() - started
    if first_s is None or process.returncode:
        raise RuntimeError(f"{command} ended with exit code {process.returncode} and said:\n{said}")
    if words == FIRST_SAVED and not any((folder / "embeddings_data").glob("*.json")):
        raise RuntimeError(f"{command} said that results were saved, but there are none in {folder}")
    return first_s, total_s


def resume(n_texts: int, work: Path, n_rounds: int, say: Say) -> list[dict[str, Any]]:
    """Texts a second at which a run goes over texts that are all done; the model is a fake that costs nothing.

    The first row is the run that fills the folder: what reading and writing cost without a model.

    Args:
        n_texts: How many.
        work: A folder for the files.
        n_rounds: Runs over the full folder.
        say: Is told of each run.
    """
    corpus = work / "resume.txt"
    corpus.write_text("".join(f"text number {number} of those done before\n" for number in range(n_texts)))
    encoder = FakeEncoder(dim=384)
    options = EmbedOptions(model=encoder, save_path=work / "resume")
    seconds = []
    for number in range(1 + n_rounds):
        stream = EmbedStream(read_texts(corpus), options, JobParts(want_results=False))
        started = time.perf_counter()
        summary = asyncio.run(stream.run())
        seconds.append(time.perf_counter() - started)
        if (summary.embedded if number == 0 else summary.cached) != n_texts:
            raise RuntimeError(f"run {number} over {n_texts} texts did something else: {summary}")
        say(f"resume: {'filling the folder' if number == 0 else 'going over it'} {seconds[-1]:.2f} s")
    rows = {"filling the folder, fake model": seconds[:1], "resumed run, all done": seconds[1:]}
    return [{"name": name, **speed(own, n_texts, 0)} for name, own in rows.items()]
