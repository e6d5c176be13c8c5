"""Where words go: results to standard output, all else to standard error, progress among it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType
from typing import Any, TextIO

import click

from asyncembed.errors import AsyncEmbedError, OptionsError, SourceError, StoreError, TextsFailedError, TextTypeError

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


if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


class Exit(IntEnum):
    """The exit codes, but for 130 and 143 after a signal."""

    DONE = 0
    INCOMPLETE = 1
    USAGE = 2
    CANNOT = 3


MEANINGS = (
    ("0", "every text is embedded"),
    ("1", "finished, but some texts failed or bad rows were skipped; errors.jsonl says which and why"),
    ("2", "bad usage, or input that cannot be read; what came before it stays saved"),
    ("3", "cannot go on, nothing is lost: the folder is locked or of another model, the disk is full, …"),
    ("130", "stopped by Ctrl-C; the same command goes on from there"),
    ("143", "stopped by SIGTERM; the same command goes on from there"),
)
"""The codes as `--help` explains them."""


def known_error(error: BaseException) -> AsyncEmbedError | click.ClickException | None:
    """The error in it that was raised on purpose; None if it is a bug."""
    if isinstance(error, (AsyncEmbedError, click.ClickException)):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := known_error(inner)) is not None), None)
    return None


def exit_code_of(error: BaseException) -> Exit:
    """The exit code that an error leads to."""
    known = known_error(error)
    # 1. A mistake in usage or input. 2. One text failed, and `--on-error raise` ends the run with it.
    # 3. Folder, model or device; or a bug.
    if isinstance(known, (OptionsError, TextTypeError, SourceError, click.ClickException)):
        return Exit.USAGE
    if isinstance(known, TextsFailedError):
        return Exit.INCOMPLETE
    return Exit.CANNOT


def mend_streams() -> None:
    """Open closed standard streams on the null device, and let standard output take every character.

    A file opened later would get the number of a closed stream, and then what is written to the stream. `sys.stdin`
    stays None: whoever wants to read it is told.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is the stream's own
            if name != "stdin":
                setattr(sys, name, open(number, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115  # stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def writing_out() -> Iterator[None]:
    """Around what writes to standard output; a reader that has gone away is no error of ours."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise  # of a file
        # Python flushes standard output once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            reason = f"standard output cannot be written to: {error.strerror}; what was saved stays"
            raise StoreError(reason) from error


logger = logging.getLogger("asyncembed")


class Console:
    """The program's voice. As a context manager it also speaks for the library's log.

    Attributes:
        display: The progress shown on standard error.
    """

    def __init__(self, *, program: str = "asyncembed", quiet: bool = False, verbose: bool = False) -> None:
        self.program = program
        self.quiet = quiet
        self.verbose = verbose
        self.display = Display(None if quiet else sys.stderr, quiet=quiet)
        self._log = _LogHandler(self)
        self._level = logging.NOTSET

    def __enter__(self) -> Console:
        logger.addHandler(self._log)
        self._level = logger.level
        logger.setLevel(logging.DEBUG if self.verbose else logging.WARNING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.display.close()
        logger.removeHandler(self._log)
        logger.setLevel(self._level)

    def say(self, line: str) -> None:
        """A line on standard error, also when quiet: an answer to what the user just did."""
        self.display.write(f"{self.program}: {line}")

    def tell(self, line: str) -> None:
        """A line on standard error if verbose."""
        if self.verbose:
            self.say(line)

    def warn(self, line: str) -> None:
        """A line on standard error, always."""
        self.display.write(f"{self.program}: warning: {line}")

    def explain(self, error: BaseException) -> Exit:
        """One line on standard error that says what went wrong, and the exit code for it."""
        self.display.close()
        if self.verbose:
            self.display.write("".join(traceback.format_exception(error)).rstrip())
        self.display.write(f"{self.program}: error: {describe(error, self.verbose)}")
        return exit_code_of(error)

    def results(self, lines: Iterable[str]) -> None:
        """Lines for a person on standard output, unless quiet."""
        if not self.quiet:
            print_out("\n".join(lines))

    def result(self, values: Mapping[str, object]) -> None:
        """The one JSON object on standard output."""
        print_out(json.dumps(values))


class _LogHandler(logging.Handler):
    """The library's log as lines of the program."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            line = record.getMessage()
            if record.levelno >= logging.WARNING:
                self._console.warn(line)
            else:
                self._console.tell(line)
        except Exception:
            self.handleError(record)


def describe(error: BaseException, verbose: bool) -> str:
    """What went wrong, in one line for a person."""
    known = known_error(error)
    if known is None:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "" if verbose else "; --verbose shows where it happened"
        return f"unexpected {words}{hint}. This is a bug in asyncembed; what was saved stays"
    words = str(known)
    if isinstance(known, click.ClickException):
        words = f"{known.format_message()} (asyncembed --help shows the options)"
    return " ".join(words.split("\n"))


def print_out(text: str) -> None:
    """Write to standard output."""
    with writing_out():
        print(text, flush=True)  # noqa: T201  # the program's output
