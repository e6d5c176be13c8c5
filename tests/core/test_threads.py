"""The one thread: calls never overlap, whatever becomes of those who wait for them, and it ends when closed."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import anyio
import pytest

from asyncembed.threads import WorkerThread


class Gate:
    """A call that tells when it has begun and ends when it is let go."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.go = threading.Event()
        self.ended = False

    def __call__(self) -> str:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.go.wait(60)
        self.ended = True
        return "done"


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


async def dropped(call: Future[Any]) -> None:
    """Wait until a queued call was dropped."""
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wrap_future(call)


async def test_run_result_and_error_come_back() -> None:
    worker = WorkerThread("core-results")
    assert await worker.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await worker.run(divmod, 7, 0)
    assert await worker.run(int, "ff", base=16) == 255
    await worker.aclose()


async def test_run_all_calls_are_made_in_one_named_thread() -> None:
    worker = WorkerThread("core-named")
    assert threads_named("core-named") == []  # it starts with the first call
    found = [await worker.run(threading.current_thread) for _ in range(3)]
    assert len(set(found)) == 1
    assert found[0].name.startswith("core-named")
    assert found[0] is not threading.current_thread()
    await worker.aclose()


async def test_run_awaiting_task_cancelled_calls_do_not_overlap() -> None:
    worker, inside, most = WorkerThread("core-overlap"), 0, 0

    def call(gate: Gate | None) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if gate is not None:
            gate()
        inside -= 1

    gates = [Gate() for _ in range(5)]
    for gate in gates:
        task = asyncio.ensure_future(worker.run(call, gate))
        await gate.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = asyncio.ensure_future(worker.run(call, None))
        await asyncio.sleep(0)
        assert not after.done()
        assert not gate.ended
        gate.go.set()
        await after
        assert gate.ended  # it ran to its end although nobody waited
    assert most == 1
    await worker.aclose()


async def test_run_cancelled_before_its_turn_is_never_made() -> None:
    worker, gate, made = WorkerThread("core-never"), Gate(), []
    first = asyncio.ensure_future(worker.run(gate))
    await gate.begun.wait()
    second = asyncio.ensure_future(worker.run(made.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    gate.go.set()
    assert await first == "done"
    await worker.run(made.append, 2)
    assert made == [2]
    await worker.aclose()


async def test_aclose_drops_queued_calls_waits_for_the_one_under_way_and_leaves_no_thread() -> None:
    worker, gate, made = WorkerThread("core-close"), Gate(), []
    first = worker.submit(gate)
    await gate.begun.wait()
    queued = [worker.submit(made.append, number) for number in range(5)]
    closing = asyncio.ensure_future(worker.aclose())
    for call in queued:
        await dropped(call)
    assert not closing.done()
    gate.go.set()
    await closing
    assert first.result() == "done"
    assert made == []
    assert threads_named("core-close") == []


async def test_aclose_again_and_unused_is_harmless() -> None:
    worker = WorkerThread("core-idempotent")
    await worker.aclose()
    await worker.aclose()
    assert threads_named("core-idempotent") == []
    with pytest.raises(RuntimeError):
        worker.submit(int)


async def test_aclose_cancelled_while_waiting_thread_ends_by_itself() -> None:
    worker, gate, made = WorkerThread("core-cancel"), Gate(), []
    worker.submit(gate)
    await gate.begun.wait()
    queued = worker.submit(made.append, 1)
    closing = asyncio.ensure_future(worker.aclose())
    await dropped(queued)
    (thread,) = threads_named("core-cancel")
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await worker.aclose()  # closed already: returns at once
    gate.go.set()
    thread.join(60)
    assert not thread.is_alive()
    assert gate.ended
    assert made == []


@pytest.mark.parametrize(
    "error", [StopIteration, StopAsyncIteration, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
async def test_run_call_raises_what_a_future_cannot_hold_ends_the_wait(error: type[BaseException]) -> None:
    worker = WorkerThread("core-strange")

    def call() -> None:
        raise error("no more")

    with anyio.fail_after(30):
        with pytest.raises(RuntimeError, match=f"{error.__name__} was raised in a thread: no more") as raised:
            await worker.run(call)
        assert isinstance(raised.value.__cause__, error)
        with pytest.raises(RuntimeError, match=error.__name__):
            await asyncio.get_running_loop().run_in_executor(worker.executor, call)
        assert await worker.run(int, "7") == 7  # the thread lives on
        with pytest.raises(RuntimeError, match=error.__name__):
            await worker.aclose(call)
    assert threads_named("core-strange") == []


async def test_aclose_worker_that_was_never_used_starts_no_thread() -> None:
    worker = WorkerThread("never-used")
    before = threading.active_count()
    await worker.aclose()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        worker.submit(int)
