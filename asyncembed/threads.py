"""Threads: one that does blocking work for the event loop, one that has a loop of its own, and what forks leave."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

import anyio

P = ParamSpec("P")
T = TypeVar("T")


class _Executor(ThreadPoolExecutor):
    """An executor whose calls fail with errors that a future of the event loop can hold."""

    was_used = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self.was_used = True
        return super().submit(partial(_call, fn), *args, **kwargs)


class WorkerThread:
    """An executor of exactly one thread, created, named and shut down here.

    Because there is one thread, calls never overlap, even when the task that awaits one is cancelled: the call
    under way runs to its end and the next begins after it. The thread starts with the first call.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._executor = _Executor(max_workers=1, thread_name_prefix=name)
        self._pending: set[Future[Any]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<WorkerThread {self.name!r} pending={len(self._pending)}{' closed' if self._closed else ''}>"

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The executor itself, for libraries that take one."""
        return self._executor

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call and return its future at once.

        What the call raises is the future's error. What a future cannot hold, or what means something else to the one
        that waits (`StopIteration`, a cancellation, `SystemExit`), becomes the cause of a `RuntimeError`.
        """
        future = self._executor.submit(function, *args, **kwargs)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the thread and await its result.

        Cancellation stops the waiting. A call that had begun runs to its end and its result is dropped; one that
        had not is never made.
        """
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    async def aclose(self, last: Callable[[], object] | None = None) -> None:
        """Drop the calls that have not begun, wait for the one under way, and end the thread. Idempotent.

        Cancelled while waiting, it leaves the thread to end by itself after its last call.
        """
        if self._closed:
            return
        self._closed = True
        if last is None and not self._executor.was_used:  # no thread was started, and none is only to be stopped
            self._executor.shutdown(wait=False)
            return
        for future in list(self._pending):
            future.cancel()
        ended = self._executor.submit(last or _nothing)
        self._executor.shutdown(wait=False)
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wrap_future(ended)
        finally:
            if ended.done() and not ended.cancelled():  # else a call before it may still be under way
                self._executor.shutdown(wait=True)  # the thread has nothing left to do: this join takes microseconds


def _call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return function(*args, **kwargs)
    except (StopIteration, StopAsyncIteration, CancelledError) as error:
        raised: BaseException = error
    except Exception:
        raise
    except BaseException as error:  # nobody but the one who waits is told of it: it ends no thread and no loop
        raised = error
    said = f": {raised}" if str(raised) else ""
    raise RuntimeError(f"{type(raised).__name__} was raised in a thread{said}") from raised


def _nothing() -> None:
    """The last call of a thread: when it returns, all before it have."""


class LoopThread:
    """An event loop in a thread of its own, for callers that have none or whose loop is busy with them.

    The thread is a daemon: a program that forgets to close it still ends.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<LoopThread {self._thread.name!r} {'alive' if self._thread.is_alive() else 'ended'}>"

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: object) -> Future[T]:
        """Starts a coroutine function on the loop: a future of its result. Cancelling that cancels the call."""
        return asyncio.run_coroutine_threadsafe(function(*args), self._loop)

    def close(self) -> None:
        """Ends the loop when all that was submitted is over, and the thread. Idempotent."""
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            while tasks := asyncio.all_tasks(self._loop):
                self._loop.run_until_complete(asyncio.wait(tasks))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


class Orphan(Protocol):
    """What lives by threads, which a child process has not."""

    def orphan(self) -> None:
        """Called in a child: refuse, or begin anew, for none of the parent's threads would ever answer."""
        ...


_living: WeakSet[Orphan] = WeakSet()


def watch(living: Orphan) -> None:
    """Tells it of forks for as long as it exists."""
    _living.add(living)


def _tell() -> None:
    for living in list(_living):
        living.orphan()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
