"""What Ctrl-C and SIGTERM do, from the first line of the program to its last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import asyncio  # takes long enough to load for a Ctrl-C to meet it

NUMBERS = (signal.SIGINT, signal.SIGTERM)
CTRL_C = "Ctrl-C"


class Signals:
    """The program's signal handlers.

    1. While `stopping` is active, the first signal calls its `stop` on the event loop. 2. The second ends the process.
    3. At any other time there is nothing to save, and the first signal ends the process.

    The handlers are `signal.signal`'s, not the event loop's: one kind serves all three cases and every platform, with
    no moment in between at which the interpreter's own handlers would answer, and a second signal is heard even if the
    event loop hangs.

    Attributes:
        received: The signal that asked the run to stop; None if none did.
    """

    def __init__(
        self,
        program: str = "asyncembed",
        farewell: str = "left at once; what was saved stays, and the same command goes on from there",
    ) -> None:
        self._program = program
        self._farewell = farewell
        self.received: int | None = None
        self._stop: Callable[[], object] | None = None

    def __repr__(self) -> str:
        return f"<Signals received={self.name!r}>"

    @property
    def name(self) -> str:
        """What a person calls the signal received; empty if there is none."""
        return name_of(self.received) if self.received is not None else ""

    @property
    def exit_code(self) -> int | None:
        """130 or 143 after a signal; None without one."""
        return None if self.received is None else 128 + self.received

    def install(self) -> None:
        """Install the handlers; a signal that the process was started to ignore (`nohup`, `&`) stays ignored."""
        with suppress(ValueError):  # not the main thread, where Python allows no handlers
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._handle)

    @contextmanager
    def stopping(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], object]) -> Iterator[None]:
        """For the time of the block the first signal calls `stop` on the loop instead of ending the process."""
        self._stop = lambda: loop.call_soon_threadsafe(stop)
        try:
            yield
        finally:
            self._stop = None

    def _handle(self, number: int, _: object) -> None:
        stop = self._stop
        if self.received is not None:
            leave(128 + number, self._farewell, self._program)
        if stop is None:
            leave(128 + number, f"stopped by {name_of(number)}", self._program)
        self.received = number
        stop()


def name_of(number: int) -> str:
    """What a person calls a signal."""
    return CTRL_C if number == signal.SIGINT else signal.Signals(number).name


def leave(code: int, line: str | None = None, program: str = "asyncembed") -> NoReturn:
    """End the process now, without waiting for threads. Safe in a handler: nothing buffered is touched."""
    if line is not None:
        with suppress(OSError):
            os.write(2, f"\n{program}: {line}\n".encode())
    os._exit(code)
