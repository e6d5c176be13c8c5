"""The command line: `asyncembed INPUT`."""

from __future__ import annotations

import sys

from asyncembed.cli.signals import Signals

__all__ = ["main"]


def main() -> int:
    """Run the program with the arguments of this process.

    Installs handlers of SIGINT and SIGTERM and leaves them installed: the process is expected to end with the code.

    Returns:
        The exit code, for `sys.exit`.
    """
    signals = Signals()
    signals.install()
    # Imported only now: a Ctrl-C during the imports is answered like any other.
    from asyncembed.cli.console import mend_streams

    mend_streams()
    from asyncembed.cli.program import run_program

    return run_program(sys.argv[1:], signals)
