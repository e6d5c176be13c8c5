"""Runs the program as a user does: a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncembed

ROOT = Path(asyncembed.__file__).parents[1]
PROGRAM = [sys.executable, "-m", "asyncembed"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: str | Path, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The program, run to its end in a folder."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        cwd=folder, env=ENVIRONMENT, input=stdin, capture_output=True, text=True, check=False,
    )  # fmt: skip


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Processes that begin in the block heed Ctrl-C, which a runner of tests in the background may ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def started(*command: str | Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes on all three; killed if the block leaves it running."""
    with heeding_ctrl_c():
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder, env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(pipe: Any, words: str) -> str:
    """Read lines until one has the words; all that was read."""
    seen = ""
    for line in pipe:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"{words!r} never came; there was {seen!r}")
