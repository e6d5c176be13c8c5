"""Tell what an exception from a model means: out of memory, a dead device, or something about the texts.

The messages are those of the runtimes themselves; nothing else counts as out of memory, so that a real fault is
never retried in silence.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import Enum

_MEMORY_MESSAGES = (
    "cuda out of memory",
    "hip out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "mps backend out of memory",
    "xpu out of memory",
    "ur_result_error_out_of_resources",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "could not create a primitive",  # oneDNN under torch, whose allocation failed
    "std::bad_alloc",
    "failed to allocate memory for requested buffer",
    "exceeded max size of memory",
    "src/plugins/intel_cpu/src/cpu_memory.cpp",  # OpenVINO: "Check 'ptr' failed at …: Failed to allocate N bytes"
    "' can't alloc",  # OpenVINO: "[CPU] Transpose node with name '…' can't alloc"
)
_FATAL_MESSAGES = ("illegal memory access", "device-side assert", "ur_result_error_device_lost")


class FailureKind(Enum):
    """What to do about a failed batch."""

    OUT_OF_MEMORY = "out of memory"  # a smaller batch may pass
    FATAL = "fatal"  # the device's context is dead: stop
    OTHER = "other"  # perhaps one of the texts: bisect


def classify(error: BaseException) -> FailureKind:
    """What kind of failure an exception is; its causes and contexts are looked through as well."""
    links = list(_chain(error))
    if any(_says(link, _FATAL_MESSAGES) for link in links):
        return FailureKind.FATAL
    if any(_is_out_of_memory(link) for link in links):
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.OTHER


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return _says(error, _MEMORY_MESSAGES)


def _says(error: BaseException, messages: tuple[str, ...]) -> bool:
    """Whether a runtime says one of the messages: a `ValueError` may only be quoting a text that holds it."""
    if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
        return False
    text = str(error).lower()
    return any(message in text for message in messages)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [link.__cause__, link.__context__]
