"""Cancels a coroutine at each of its steps in turn, and checks that nothing is left of it."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from asyncembed import AsyncEmbedder, ClosedError, embed_stream, open_embeddings
from asyncembed.engine.chunking import Chunker
from asyncembed.engine.client import EngineClient
from asyncembed.engine.engine import EncoderThread, Engine
from asyncembed.engine.limits import TokenLimitEstimator
from asyncembed.engine.work import Work
from asyncembed.store.files import StorePaths
from asyncembed.store.lock import FolderLock
from asyncembed.threads import WorkerThread
from tests.fakes import FakeEncoder

TEXTS = ["one", "two words", "one", "", "three words here", " ".join("word" for _ in range(100)), *map(str, range(12))]
"""Among them a repeat, one that fails, and one of several chunks."""

UNIQUE_GOOD = set(TEXTS) - {""}


class Stepped:
    """An awaitable that runs a coroutine step by step, and tells: a step ends where the coroutine really waits."""

    def __init__(self, inner: Coroutine[Any, Any, Any], on_step: Callable[[], None]) -> None:
        self._inner = inner
        self._on_step = on_step

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._inner.__await__()
        send: Callable[[], Any] = lambda: next(steps)  # noqa: E731  # replaced at each step
        while True:
            try:
                waited_for = send()
            except StopIteration as end:
                return end.value
            self._on_step()
            try:
                value = yield waited_for
            except BaseException as error:
                thrown = error
                send = lambda: steps.throw(thrown)  # noqa: B023, E731  # called at once
            else:
                send = lambda: steps.send(value)  # noqa: B023, E731  # called at once


class Canceller:
    """A task factory that counts the steps of all tasks together, and at one step cancels one of the tasks.

    Args:
        victim: What the name of the task to cancel begins with.
        at_step: The step, of whichever task, after which it is cancelled.
    """

    def __init__(self, victim: str, at_step: int) -> None:
        self.struck = False
        self._victim = victim
        self._at_step = at_step
        self.n_steps = 0
        self._victims: list[asyncio.Task[Any]] = []

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **attributes: Any) -> asyncio.Task[Any]:
        async def run() -> Any:
            return await Stepped(coro, self._step)

        task = asyncio.Task(run(), loop=loop, **attributes)
        if task.get_name().startswith(self._victim):
            self._victims.append(task)
        return task

    def _step(self) -> None:
        self.n_steps += 1
        if self.n_steps == self._at_step:
            for task in self._victims:
                self.struck = task.cancel() or self.struck


@dataclass
class Leftovers:
    """What was found wrong after a cancellation."""

    found: list[str]

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.found.append(what)


Form = Callable[[Path, list[Any]], Awaitable[None]]


def _stream(folder: Path, kept: list[Any]) -> Any:
    stream = embed_stream(TEXTS, model=FakeEncoder(), save_path=folder, batch_size=4)
    kept.append(stream)
    return stream


async def awaited(folder: Path, kept: list[Any]) -> None:
    await _stream(folder, kept)


async def iterated(folder: Path, kept: list[Any]) -> None:
    async for _ in _stream(folder, kept):
        pass


async def run(folder: Path, kept: list[Any]) -> None:
    await _stream(folder, kept).run()


async def entered(folder: Path, kept: list[Any]) -> None:
    async with _stream(folder, kept) as stream:
        async for _ in stream:
            await asyncio.sleep(0)


async def closed_early(folder: Path, kept: list[Any]) -> None:
    async with _stream(folder, kept) as stream:
        async for _ in stream:
            break


async def async_source(folder: Path, kept: list[Any]) -> None:
    async def texts() -> Any:
        for text in TEXTS:
            yield text

    stream = embed_stream(texts(), model=FakeEncoder(), save_path=folder, ordered=True, max_memory_usage=9000)
    kept.append(stream)
    async for _ in stream:
        pass


async def engine_alone(folder: Path, kept: list[Any]) -> None:
    encoder = FakeEncoder()
    worker = WorkerThread("asyncembed-model")
    chunker = Chunker(encoder.tokenizer(), encoder.max_tokens)
    engine = Engine(EncoderThread(encoder, TokenLimitEstimator(64), thread=worker))
    client = EngineClient(engine, chunker.chunk)

    async def run_engine() -> None:
        try:
            await engine.run()
        finally:
            engine.break_clients(ClosedError("the engine has ended"))

    async def submit() -> None:
        try:
            for text in TEXTS:
                await client.submit([Work(client, text, waiters=[text])])
        finally:
            client.close()

    async def collect() -> None:
        while await client.finished():
            pass

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(run_engine, name="asyncembed-engine")
            group.start_soon(submit)
            group.start_soon(collect)
            try:
                await client.run()
            finally:
                engine.close()
    finally:
        await worker.aclose()


async def embedder(folder: Path, kept: list[Any]) -> None:
    async with AsyncEmbedder(FakeEncoder()) as made, anyio.create_task_group() as group:
        for text in TEXTS:
            group.start_soon(made.embed_records, [text])


FORMS: dict[str, Form] = {
    form.__name__: form
    for form in (awaited, iterated, run, entered, closed_early, async_source, engine_alone, embedder)
}
_MADE = {"engine_alone": "asyncembed-engine", "embedder": "asyncembed-embedder"}
VICTIMS = {form: ("user", _MADE.get(form, "asyncembed-job")) for form in FORMS}
"""Tasks that are cancelled: the user's own, and the one that the package makes, or the user for a bare engine."""


def cancel_at(form: str, victim: str, step: int, folder: Path) -> tuple[bool, list[str]]:
    """Run a form of the job and cancel one of its tasks at one step.

    Returns:
        Whether the job came that far, and what was left behind.
    """
    wrong = Leftovers([])
    canceller = Canceller(victim, step)
    kept: list[Any] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(canceller)
        loop.set_exception_handler(lambda _, context: wrong.found.append(f"the loop was told: {context['message']}"))
        task = loop.create_task(FORMS[form](folder, kept), name="user")  # type: ignore[arg-type]
        done, pending = await asyncio.wait([task], timeout=60)
        wrong.check(not pending, "it hangs")
        error = None if not done or task.cancelled() else task.exception()
        if victim == "user" and error is not None:
            wrong.found.append(f"cancelling raised {error!r}")
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # cancelled while it waits for the job to close, the user's task leaves it to close by itself
            await asyncio.wait(others, timeout=60)
            others = asyncio.all_tasks() - {asyncio.current_task()}
        wrong.check(not others, f"tasks are left: {others}")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        asyncio.run(main())
        for stream in kept:
            check_stream(stream, wrong)
        kept.clear()
        gc.collect()
    wrong.found.extend(f"warned: {warning.message}" for warning in warned)
    for thread in threading.enumerate():  # the same holds for a thread: its last call has no more to do than to end
        if thread.name.startswith("asyncembed"):
            thread.join(30)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncembed")]
    wrong.check(not threads, f"threads are left: {threads}")
    if form != "engine_alone":
        check_folder(folder, wrong)
    return canceller.n_steps >= step, wrong.found


def count_steps(form: str, folder: Path) -> int:
    """Steps of a form that nobody cancels."""
    canceller = Canceller("nobody", 0)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(canceller)
        await asyncio.get_running_loop().create_task(FORMS[form](folder, []), name="user")  # type: ignore[arg-type]

    asyncio.run(main())
    return canceller.n_steps


def check_stream(stream: Any, wrong: Leftovers) -> None:
    if stream._job is not None:
        now = stream._job.admission.statistics()
        wrong.check((now.reserved_bytes, now.n_in_flight, now.n_waiting) == (0, 0, 0), f"reserved: {now}")


def check_folder(folder: Path, wrong: Leftovers) -> None:
    """Nothing torn, the lock free, and the next run makes it whole."""
    if folder.exists():
        names = [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]
        wrong.check(not names, f"temporary files: {names}")
        lock = FolderLock(StorePaths.of(folder))
        lock.acquire()
        lock.release()
        for stored in open_embeddings(folder):  # each is checked as it is read
            wrong.check(stored.text in UNIQUE_GOOD, f"an odd text: {stored.text!r}")
    summary = asyncio.run(embed_stream(TEXTS, model=FakeEncoder(), save_path=folder).run())
    wrong.check((summary.texts, summary.failed) == (len(TEXTS), 1), f"the next run: {summary}")
    wrong.check({stored.text for stored in open_embeddings(folder)} == UNIQUE_GOOD, "the next run lacks texts")
    wrong.check(not list(folder.glob("*-wal")), "the ledger is not closed")
