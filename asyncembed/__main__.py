"""`python -m asyncembed` is the command `asyncembed`."""

from __future__ import annotations

import sys

from asyncembed.cli import main

if __name__ == "__main__":
    sys.exit(main())
