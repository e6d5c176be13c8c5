"""`asyncembed-store`: look after a folder of embeddings, without a model."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program with the arguments of this process; ends in `SystemExit` with the exit code."""
    from asyncembed.cli.signals import Signals
    from asyncembed.cli.streams import mend_streams

    Signals().install()  # Ctrl-C and SIGTERM end it in one line: nothing it does can be left half done
    mend_streams()
    from asyncembed.store_cli.program import run

    sys.exit(run(sys.argv[1:]))
