"""The HTTP service: `asyncembed-server`, an OpenAI-compatible `/v1/embeddings` over one `AsyncEmbedder`."""

from __future__ import annotations

import sys

from asyncembed.cli.console import mend_streams
from asyncembed.cli.signals import Signals

__all__ = ["main"]


def main() -> int:
    """Run the server with the arguments of this process.

    Installs handlers of SIGINT and SIGTERM and leaves them installed: the process is expected to end with the code.

    Returns:
        The exit code, for `sys.exit`.
    """
    signals = Signals("asyncembed-server", farewell="left at once; requests under way were cut off")
    signals.install()
    mend_streams()
    # Imported only now: a Ctrl-C during the imports is answered like any other.
    from asyncembed.server.program import run_program

    return run_program(sys.argv[1:], signals)
