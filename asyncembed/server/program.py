"""The program: parse, serve, and turn whatever happens into lines and an exit code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

import click

from asyncembed.cli.exits import Exit, exit_code_of, known_error
from asyncembed.cli.signals import Signals
from asyncembed.cli.streams import writing_out
from asyncembed.server.parsing import PROGRAM_NAME, parse
from asyncembed.server.settings import ServerSettings

NEEDED = ("starlette", "uvicorn", "prometheus_client")
"""What the extra `server` brings."""


def run_program(arguments: Sequence[str], signals: Signals) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    try:
        settings: ServerSettings | int = Exit.DONE
        with writing_out():
            settings = parse(arguments)
        if isinstance(settings, int):
            return settings
        missing = [name for name in NEEDED if not _is_installed(name)]
        if missing:
            say(f"error: {' and '.join(missing)} not installed; pip install 'asyncembed[server]' brings what is needed")
            return Exit.USAGE
        logging.basicConfig(format=f"{PROGRAM_NAME}: %(levelname)s: %(message)s", level=logging.WARNING)
        from asyncembed.server.serving import serve

        return serve(settings, signals, say)
    except Exception as error:
        if known_error(error) is None:
            raise
        say(f"error: {_words(error)}")
        return exit_code_of(error)


def say(line: str) -> None:
    """A line on standard error, if that takes it."""
    with suppress(OSError):
        click.echo(f"{PROGRAM_NAME}: {line}", err=True)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # imported before, and made unusable
        return False


def _words(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return f"{error.format_message()} ({PROGRAM_NAME} --help shows the options)"
    return " ".join(str(known_error(error)).split("\n"))
