"""Runs small jobs in processes of their own, each killed at one step of what it does to the disk.

`python -m tests.job.stepping FOLDER DURABILITY` prints a line of JSON for each series of jobs. All that is special
happens out here: the calls of `os` are wrapped, and the product knows nothing of it.
"""

from __future__ import annotations

import asyncio
import builtins
import io
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from asyncembed import embed_stream, text_id
from asyncembed.records import Batch
from tests.fakes import FakeEncoder

TEXTS = [f"text number {n}" for n in range(3)]
_write, _kill = os.write, os.kill


class Steps:
    """Counts what changes the disk, and kills this process at one step; a write is two, its halves."""

    def __init__(self, fatal: int | None) -> None:
        self.n = 0
        self._fatal = fatal
        self._halved: set[int] = set()
        for name in ("open", "replace", "unlink", "ftruncate", "fsync", "mkdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        os.write = self._write_in_halves  # type: ignore[assignment]
        self._open = builtins.open
        builtins.open = self._open_counted  # type: ignore[assignment]
        self._count_statements()

    def _count_statements(self) -> None:
        """What the ledger is asked or told is a step too, in the middle of a transaction as well."""
        step, connect = self.step, sqlite3.connect

        class Counted(sqlite3.Connection):
            def execute(self, *arguments: Any) -> sqlite3.Cursor:
                step()
                return super().execute(*arguments)

            def executemany(self, *arguments: Any) -> sqlite3.Cursor:
                step()
                return super().executemany(*arguments)

        sqlite3.connect = partial(connect, factory=Counted)  # type: ignore[assignment]

    def step(self) -> None:
        """One step further; the fatal one is the last."""
        self.n += 1
        if self.n == self._fatal:
            _kill(os.getpid(), signal.SIGKILL)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.step()
            return call(*arguments, **named)

        return counted

    def _write_in_halves(self, descriptor: int, data: Any) -> int:
        """Write the first half only, as a disk may; who asked writes the rest."""
        self.step()
        if descriptor in self._halved:
            self._halved.remove(descriptor)
            return _write(descriptor, data)
        self._halved.add(descriptor)
        return _write(descriptor, data[: (len(data) + 1) // 2])

    def _open_counted(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode != "wb":
            return self._open(file, mode, *arguments, **named)
        steps = self

        class Halved(io.FileIO):
            def write(self, data: Any) -> int:
                steps.step()
                super().write(memoryview(data)[: len(data) // 2])
                steps.step()
                return len(data) // 2 + (super().write(memoryview(data)[len(data) // 2 :]) or 0)

        self.step()
        return io.BufferedWriter(Halved(file, mode), 512)


def run_job(folder: Path, log: Path, fatal: int | None, durability: str) -> int:
    """One job over `TEXTS`; how many steps it took. Notes each text it computes in `log`."""
    steps = Steps(None)

    def note(batch: Batch) -> None:
        found = [text_id(chunk.text) for chunk in batch.chunks]
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _write(descriptor, "".join(f"{identity}\n" for identity in found).encode())
        os.close(descriptor)

    async def job() -> None:
        encoder = FakeEncoder(on_batch=note)
        await embed_stream(TEXTS, model=encoder, save_path=folder, batch_size=2, durability=durability).run()

    steps._fatal = fatal
    asyncio.run(job())
    return steps.n


def in_a_child(folder: Path, log: Path, fatal: int | None, durability: str) -> tuple[int, int]:
    """Its wait status and the number of its steps (0 if it was killed), from a child forked before any thread began."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            _write(writable, b"%d" % run_job(folder, log, fatal, durability))
            code = 0
        finally:
            os._exit(code)
    os.close(writable)
    with open(readable, "rb") as pipe:
        n_steps = int(pipe.read() or 0)
    return os.waitpid(child, 0)[1], n_steps


def state(folder: Path, log: Path) -> dict[str, Any]:
    """What a kill left: files that are whole, files that are not, and how often each text was computed so far."""
    whole, torn = [], []
    for path in (folder / "embeddings_data").glob("*.json"):
        try:
            whole.append(json.loads(path.read_bytes())["id"])
        except ValueError:
            torn.append(path.name)
    return {"whole": sorted(whole), "torn": torn, "computed": log.read_text().split() if log.exists() else []}


def main() -> None:
    """Kill a job at every step, its successor at another (with flushing, none), and let the last go to the end."""
    work, durability = Path(sys.argv[1]), sys.argv[2]
    fatal, n_steps, is_over = 0, 40, False
    while not is_over:  # how a job groups its commits varies, and with it the number of its steps
        fatal += 1
        folder, log = work / str(fatal), work / f"{fatal}.log"
        runs = []
        for at in (fatal, *([1 + fatal * 7 % n_steps] if durability == "process" else []), None):
            status, n_found = in_a_child(folder, log, at, durability)
            is_over |= at == fatal and not status
            n_steps = n_found or n_steps
            runs.append({"status": status, **state(folder, log)})
        index = json.loads((folder / "embeddings_index.json").read_bytes())
        rest = sorted(path.name for path in folder.rglob("*") if path.suffix != ".json")
        done = sorted(identity for identity, entry in index["texts"].items() if entry["status"] == "completed")
        print(json.dumps({"step": fatal, "runs": runs, "index": done, "rest": rest}), flush=True)


if __name__ == "__main__":
    main()
