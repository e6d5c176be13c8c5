"""Where words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType

import click

from asyncembed.cli.progress import Display
from asyncembed.errors import AsyncEmbedError, OptionsError, SourceError, StoreError, TextsFailedError, TextTypeError

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
