"""`python -m asyncembed.store_cli` is the command `asyncembed-store`."""

from __future__ import annotations

from asyncembed.store_cli import main

if __name__ == "__main__":
    main()
