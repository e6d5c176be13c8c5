"""Progress on standard error: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

TICK_S = 0.25
FIRST_LINE_S = 10.0
LINE_EVERY_S = 30.0
MOST_SHOWN = 0.99
"""A bar that says 100 % has ended: until then this is the most it says."""


class Display:
    """Shows how far a run is: a tqdm bar on a terminal; else a line when something begins, after ten seconds, and every
    thirty seconds from then on; nothing if quiet. No method fails because standard error does.
    """

    def __init__(
        self, file: TextIO | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = file
        self._quiet = quiet
        self._is_terminal = not quiet and file is not None and file.isatty()
        self._clock = clock
        self._bar: Any = None
        self._share = self._began = self._next = 0.0
        self._begin()

    def loading(self, what: str) -> None:
        """The model is loaded from now on."""
        if self._is_terminal:
            self._show(f"loading {what} … {{elapsed}}", None)
        elif not self._quiet:
            self.write(f"asyncembed: loading {what} …")

    def started(self, what: str) -> None:
        """The work itself begins."""
        if self._is_terminal:
            self.close()
        elif not self._quiet:
            self.write(f"asyncembed: {what}")
        self._begin()

    def due(self) -> bool:
        """Whether an `update` would be shown."""
        return self._clock() >= self._next

    def update(self, share: float | None, words: str) -> None:
        """How much is done, from 0 to 1 where that is known, and what to say about it."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (TICK_S if self._is_terminal else LINE_EVERY_S)
        share = min(share, MOST_SHOWN) if share is not None else None
        if self._is_terminal:
            self._advance(share, words)
            return
        if share:
            left = in_words((now - self._began) * (1 - share) / share)
            words = f"{share:.0%}, {words}, about {left} left"
        self.write(f"asyncembed: {words}")

    def write(self, line: str) -> None:
        """A line of text; a bar stays below it."""
        file = self._file if self._file is not None else sys.stderr
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            if self._bar is not None:
                self._bar.clear()
            file.write(f"{line}\n")
            file.flush()
            if self._bar is not None:
                self._bar.refresh()

    def close(self) -> None:
        """Take away what is shown. Idempotent."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def _begin(self) -> None:
        self._began = self._clock()
        self._next = math.inf if self._quiet else self._began + (0 if self._is_terminal else FIRST_LINE_S)

    def _advance(self, share: float | None, words: str) -> None:
        if self._bar is None:
            known = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._show(known if share is not None else "{elapsed}{postfix}", 1.0 if share is not None else None)
        with contextlib.suppress(OSError, ValueError):
            self._bar.set_postfix_str(words, refresh=False)
            step = max(0.0, (share or 0.0) - self._share)
            self._share += step
            self._bar.update(step)
            self._bar.refresh()

    def _show(self, bar_format: str, total: float | None) -> None:
        from tqdm import tqdm

        self.close()
        tqdm.monitor_interval = 0  # its thread watches for slow updates; ours come by the clock
        self._share = 0.0
        self._bar = tqdm(
            total=total, bar_format=bar_format, leave=False, dynamic_ncols=True, mininterval=0.0, file=self._file
        )


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
