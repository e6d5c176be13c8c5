"""One process for each contestant, alive from its model's loading to the end, taking turns.

A process of its own, because in a shared one the contestants' thread pools (OpenMP's, OpenVINO's) and allocators would
get into each other's way, and memory could not be told apart. All stay alive, because rounds must alternate and a
model is loaded once. While one has its turn the others wait for a message, which costs no processor time.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.benchmarks.contestants import EncodeContestant, JobContestant, Plan, describe
from tests.benchmarks.corpora import read
from tests.benchmarks.measure import Turn

Make = Callable[[Any, Path], Any]
"""A contestant of its plan and a folder for its files; a function of a module, for it is sent to the process."""

GRACE_S = 10.0
"""How long a process may take to leave when it is not needed any more."""


class Worker:
    """A contestant in its own process. Make all of them, then `wait` for each: they load side by side.

    Args:
        plan: What it loads.
        work: A folder for its files.
        make: Makes the contestant, in its process.
    """

    def __init__(self, plan: Plan, work: Path, make: Make) -> None:
        self.plan = plan
        context = multiprocessing.get_context("spawn")  # nothing of one contestant is in another
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, plan, work, make), daemon=True)
        self._process.start()
        theirs.close()

    def __repr__(self) -> str:
        return f"<Worker {self.plan.name!r} pid={self._process.pid}>"

    def wait(self) -> None:
        """Until the model is loaded."""
        self._receive()

    def warm_up(self, corpus: Path) -> None:
        """One run that does not count."""
        self.ask("warm_up", corpus)

    def describe(self, corpus: Path) -> dict[str, Any]:
        """Number and tokens of a corpus' texts, as the model takes them."""
        described: dict[str, Any] = self.ask("describe", corpus)
        return described

    def measure(self, turn: str, corpus: Path, limit: int | None = None) -> Turn:
        """One turn."""
        measured: Turn = self.ask("measure", turn, corpus, limit)
        return measured

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, *request: Any) -> Any:
        """Call one of the contestant's methods, by its name."""
        self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, answer = self._connection.recv()
        except EOFError:
            self._process.join(GRACE_S)
            raise RuntimeError(f"the process of {self.plan.name} died, exit code {self._process.exitcode}") from None
        if not ok:
            raise RuntimeError(f"{self.plan.name} failed:\n{answer}")
        return answer


class Workers:
    """All contestants, loaded; as a context manager it ends their processes.

    Args:
        plans: The contestants.
        work: A folder for their files.
        make: Makes a contestant of its plan, in its process.
    """

    def __init__(self, plans: Sequence[Plan], work: Path, make: Make | None = None) -> None:
        self._plans = plans
        self._work = work
        self._make = make if make is not None else make_contestant
        self.all: list[Worker] = []

    def __enter__(self) -> Workers:
        try:
            for plan in self._plans:
                self.all.append(Worker(plan, self._work, self._make))
            for worker in self.all:
                worker.wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.all:
            worker.close()


def make_contestant(plan: Plan, work: Path) -> Any:
    """A contestant with a whole job."""
    return (EncodeContestant if plan.backend == "encode" else JobContestant)(plan, work)


def _serve(connection: Connection, plan: Plan, work: Path, make: Make) -> None:
    """The life of a process."""
    contestant: Any = None
    try:
        contestant = make(plan, work)
        connection.send((True, None))
        while True:
            name, *arguments = connection.recv()
            if name == "describe":
                answer: Any = describe(contestant.encoder(), read(*arguments))
            else:
                answer = getattr(contestant, name)(*arguments)
            connection.send((True, answer))
    except EOFError:
        pass  # not needed any more
    except Exception:
        connection.send((False, traceback.format_exc()))
    finally:
        if hasattr(contestant, "close"):
            contestant.close()
