"""Exit codes, and which error leads to which."""

from __future__ import annotations

import sys
from enum import IntEnum

import click

from asyncembed.errors import AsyncEmbedError, OptionsError, SourceError, TextsFailedError, TextTypeError

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
