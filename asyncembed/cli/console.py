"""Where words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType

import click

from asyncembed.cli.exits import Exit, exit_code_of, known_error
from asyncembed.cli.progress import Display, Silent, make_display
from asyncembed.cli.streams import writing_out

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
        self.display: Display = Silent() if quiet else make_display(sys.stderr)
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
    """Write to standard output.

    Raises:
        StoreError: It takes nothing.
    """
    with writing_out():
        print(text, flush=True)  # noqa: T201  # the program's output
