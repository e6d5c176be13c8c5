"""`python -m asyncembed.server`: the same as the command `asyncembed-server`."""

import sys

from asyncembed.server import main

if __name__ == "__main__":
    sys.exit(main())
