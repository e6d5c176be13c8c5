"""Progress on standard error: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TextIO

TICK_S = 0.25
FIRST_LINE_S = 10.0
LINE_EVERY_S = 30.0
MOST_SHOWN = 0.99
"""A bar that says 100 % has ended: until then this is the most it says."""


class Display(Protocol):
    """Shows how far a run is. No method fails because standard error does."""

    def loading(self, what: str) -> None:
        """The model is loaded from now on."""

    def started(self, what: str) -> None:
        """The work itself begins."""

    def due(self) -> bool:
        """Whether an `update` would be shown."""

    def update(self, share: float | None, words: str) -> None:
        """How much is done, from 0 to 1 where that is known, and what to say about it."""

    def write(self, line: str) -> None:
        """A line of text; a bar stays below it."""

    def close(self) -> None:
        """Take away what is shown. Idempotent."""


class Silent:
    """Shows no progress; lines of text still appear."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def loading(self, what: str) -> None:
        """Nothing."""

    def started(self, what: str) -> None:
        """Nothing."""

    def due(self) -> bool:
        """Never."""
        return False

    def update(self, share: float | None, words: str) -> None:
        """Nothing."""

    def write(self, line: str) -> None:
        """A line of text."""
        file = self._file if self._file is not None else sys.stderr
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            file.write(f"{line}\n")
            file.flush()

    def close(self) -> None:
        """Nothing."""


class Lines(Silent):
    """A line when something begins, after ten seconds, and every thirty seconds from then on."""

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(file)
        self._clock = clock
        self._began = clock()
        self._next = self._began + FIRST_LINE_S

    def loading(self, what: str) -> None:
        """One line."""
        self.write(f"asyncembed: loading {what} …")

    def started(self, what: str) -> None:
        """One line, and the clock starts."""
        self.write(f"asyncembed: {what}")
        self._began = self._clock()
        self._next = self._began + FIRST_LINE_S

    def due(self) -> bool:
        """Whether it is time for a line."""
        return self._clock() >= self._next

    def update(self, share: float | None, words: str) -> None:
        """A line if it is time for one."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + LINE_EVERY_S
        if share:
            share = min(share, MOST_SHOWN)
            left = in_words((now - self._began) * (1 - share) / share)
            words = f"{share:.0%}, {words}, about {left} left"
        self.write(f"asyncembed: {words}")


class Bar(Silent):
    """A tqdm bar on a terminal."""

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__(file)
        self._bar: Any = None
        self._share = 0.0
        self._next = 0.0

    def loading(self, what: str) -> None:
        """A line with the time that passes."""
        self._show(f"loading {what} … {{elapsed}}", None)

    def started(self, what: str) -> None:
        """The bar appears with the first update."""
        self.close()

    def due(self) -> bool:
        """Whether a tick has passed since the last update."""
        return time.monotonic() >= self._next

    def update(self, share: float | None, words: str) -> None:
        """Draw the bar anew."""
        self._next = time.monotonic() + TICK_S
        if self._bar is None:
            known = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._show(known if share is not None else "{elapsed}{postfix}", 1.0 if share is not None else None)
        with contextlib.suppress(OSError, ValueError):
            if words:
                self._bar.set_postfix_str(words, refresh=False)
            step = max(0.0, min(share or 0.0, MOST_SHOWN) - self._share)
            self._share += step
            self._bar.update(step)
            self._bar.refresh()

    def write(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            super().write(line)
            return
        with contextlib.suppress(OSError, ValueError):
            self._bar.clear()
            super().write(line)
            self._bar.refresh()

    def close(self) -> None:
        """The bar goes away."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def _show(self, bar_format: str, total: float | None) -> None:
        from tqdm import tqdm

        self.close()
        tqdm.monitor_interval = 0  # its thread watches for slow updates; ours come by the clock
        self._share = 0.0
        self._bar = tqdm(
            total=total, bar_format=bar_format, leave=False, dynamic_ncols=True, mininterval=0.0, file=self._file
        )


class Ticker:
    """Calls a function on the running event loop at once and every `TICK_S` until the block ends.

    By the clock, not by results: it costs the same however fast those come, and a display moves on while none come.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._handle: asyncio.TimerHandle | None = None

    def __enter__(self) -> Ticker:
        self._tick()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _tick(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._call()


def make_display(file: TextIO) -> Display:
    """A bar if the file is a terminal, lines if not."""
    return Bar(file) if file.isatty() else Lines(file)


def in_words(seconds: float) -> str:
    """A time for a person: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, part_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{whole} s"
