"""The program: parse, do, and turn whatever happens into lines and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncembed.cli.console import Console
from asyncembed.cli.exits import Exit
from asyncembed.cli.parsing import parse
from asyncembed.cli.request import Request
from asyncembed.cli.signals import Signals
from asyncembed.cli.streams import writing_out
from asyncembed.errors import OptionsError, StoreMismatchError
from asyncembed.options import FILE_OPTIONS

if TYPE_CHECKING:
    from asyncembed.sinks.folder import StorePaths


def run_program(arguments: Sequence[str], signals: Signals) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    request: Request | int = Exit.DONE
    try:
        with writing_out():
            request = parse(arguments)
    except Exception as error:
        return Console(quiet=True).explain(error)
    if isinstance(request, int):
        return request
    with Console(quiet=request.quiet, verbose=request.verbose) as console:
        try:
            return _perform(request, console, signals)
        except Exception as error:
            code = console.explain(error)
            return signals.exit_code or code


def _perform(request: Request, console: Console, signals: Signals) -> int:
    # The input is opened before anything heavy is imported: a wrong name is told at once.
    from asyncembed.sinks.folder import StorePaths
    from asyncembed.sources import read_texts

    options = request.options
    if options.folder is not None:
        _check_input(request.input, StorePaths.of(options.folder))
    if request.input == "-" and sys.stdin is not None and sys.stdin.isatty():
        console.say("reading texts from the terminal; Ctrl-D ends them")
    # Whoever reads the texts closes them. Not closed here: after a stop a thread may still wait in standard input, and
    # closing would wait with it.
    texts = read_texts(
        request.input,
        limit=request.limit,
        **{name: getattr(options, name) for name in FILE_OPTIONS},
    )
    if request.dry_run:
        from asyncembed.cli.dry_run import dry_run

        plan = dry_run(request, texts, console)
        if plan.refused is not None:
            raise StoreMismatchError(plan.refused)
        return Exit.DONE
    from asyncembed.cli.run import Run

    return Run(request, texts, console, signals).execute()


def _check_input(name: str, paths: StorePaths) -> None:
    """Refuse an input that the run would replace or remove.

    Raises:
        OptionsError: It is one of the folder's own files.
    """
    if os.path.realpath(name) in map(os.path.realpath, (paths.errors, paths.index, paths.journal)):
        raise OptionsError(
            f"{name} belongs to {paths.root}, and the run would replace it; copy it, or choose another folder"
        )
