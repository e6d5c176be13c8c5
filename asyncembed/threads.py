"""One named thread that does blocking work for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

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
        with anyio.CancelScope(shield=True):
            await asyncio.wrap_future(ended)
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
