"""The program with a side log and, if asked for, a sudden end in the middle of a write.

`python -m tests.soak.killed LOG STEP ARGUMENTS…` notes the id of each text it computes in LOG, and kills itself at the
STEP-th time that it opens, writes, flushes, renames or removes a file (0 for never); a write is two such steps.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

from asyncembed.cli import main
from asyncembed.encoders.openvino_encoder import OpenVinoEncoder
from asyncembed.encoders.torch_encoder import TorchEncoder
from asyncembed.records import Batch, text_id


def note_computed(kind: Any, log: int) -> None:
    """Let an encoder class write down what it starts: one append a batch, which a kill does not take back."""
    start, append = kind.start, os.write

    def noted(self: Any, batch: Batch) -> Any:
        asked = [chunk for chunk in batch.chunks if chunk.work is not None]  # the others only try the model
        append(log, "".join(f"{text_id(chunk.text)}\n" for chunk in asked).encode())
        return start(self, batch)

    kind.start = noted


def kill_at(fatal: int) -> None:
    """Let this process end at one step of what it does to the disk, without a word."""
    steps = count(1)
    write = os.write
    halved: set[int] = set()

    def step() -> None:
        if next(steps) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any, **named: Any) -> Any:
            step()
            return call(*arguments, **named)

        return stepping

    def in_halves(descriptor: int, data: Any) -> int:
        step()
        if descriptor in halved or len(data) < 2:
            halved.discard(descriptor)
            return write(descriptor, data)
        halved.add(descriptor)
        return write(descriptor, data[: len(data) // 2])

    for name in ("open", "replace", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    os.write = in_halves  # type: ignore[assignment]


if __name__ == "__main__":
    descriptor = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for encoder in (OpenVinoEncoder, TorchEncoder):
        note_computed(encoder, descriptor)
    if step := int(sys.argv.pop(1)):
        kill_at(step)
    sys.exit(main())
