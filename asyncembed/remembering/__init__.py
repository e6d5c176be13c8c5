"""What was learnt about a model's batches on this machine, kept for the next run."""

from __future__ import annotations

from asyncembed.remembering.keeper import LimitKeeper
from asyncembed.remembering.limit_file import LimitFile, Remembered

__all__ = ["LimitFile", "LimitKeeper", "Remembered"]
