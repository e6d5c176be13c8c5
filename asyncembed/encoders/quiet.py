"""What loading and converting a model change of the process for a while: what libraries log, and random numbers.

One thread at a time does either, so that each gives back what it found and not what another has set.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


def _renew_lock() -> None:
    """In a child process: the thread that held it in the parent is not here to give it back."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class _LoadReports(logging.Filter):
    """Takes transformers' reports on tensors out of its log, and keeps the names of those that are missing.

    Those of another thread, where the program around loads a model of its own, are left alone. A pooler is left out:
    plain language models come without, and no pooling module looks at it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text or threading.get_ident() != self._thread:
            return True
        names = re.findall(r"^(\S+(?: \S+)*) +\|.*MISSING", re.sub(r"\x1b\[[0-9;]*m", "", text), re.MULTILINE)
        self.missing += [name for name in names if "pooler" not in name]
        return False


@contextmanager
def quiet_loading() -> Iterator[list[str]]:
    """Without the loader's own progress bars and reports, which would cut through ours, and its lines about each retry.

    Tensors that are nowhere in the files are random: the same ones each time, so that a run can be gone on with.

    Yields:
        The names of the tensors that the model lacks, filled meanwhile.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    with _lock:
        hub, library = logging.getLogger("huggingface_hub"), logging.getLogger("transformers.modeling_utils")
        levels = hub.level, library.level
        hub.setLevel(logging.ERROR)
        if not library.isEnabledFor(logging.WARNING):  # it makes no report for those who do not want to read one
            library.setLevel(logging.WARNING)
        reports = _LoadReports()
        library.addFilter(reports)
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # a model is made on the CPU; `torch.manual_seed` seeds GPUs too
                yield reports.missing
        finally:
            library.removeFilter(reports)
            hub.setLevel(levels[0])
            library.setLevel(levels[1])
            if shown:
                transformers_logging.enable_progress_bar()


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """Without the tracer's remarks about constants, which the check on probes decides, and transformers' on configs."""
    with _lock:
        library = logging.getLogger("transformers")
        level = library.level
        library.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            library.setLevel(level)
