"""What a fork leaves behind: a child has the embedder, but neither its threads nor its event loop."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Orphan(Protocol):
    """What lives by threads, which a child process has not."""

    def orphan(self) -> None:
        """Called in a child: refuse, or begin anew, for none of the parent's threads would ever answer."""
        ...


_living: WeakSet[Orphan] = WeakSet()


def watch(living: Orphan) -> None:
    """Have it told of forks for as long as it exists."""
    _living.add(living)


def _tell() -> None:
    for living in list(_living):
        living.orphan()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
