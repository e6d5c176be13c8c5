"""Standard streams that can be written to, whatever a service, a pipe or a full disk made of them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from asyncembed.errors import StoreError


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
    """Around what writes to standard output; a reader that has gone away is no error of ours.

    Raises:
        StoreError: It takes nothing, as on a full disk.
    """
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
