"""The numbers of a run."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(slots=True)
class Summary:
    """The numbers of a run, live while it goes on; `texts == embedded + cached + duplicates + failed`.

    Attributes:
        texts: Texts taken from the input.
        embedded: Computed by this run.
        cached: Saved by an earlier run, not computed again.
        duplicates: Repeats within this run of a text it had computed.
        failed: Without a vector; the reasons are in `EmbedStream.failures` and `errors.jsonl`.
        others: Texts in the folder that are none of this run's input; None if they were not counted.
        skipped: Rows of a file that could not be a text, skipped on request, and blank ones.
        blank: How many of the skipped rows were only blank.
        chunks: Chunks of the embedded texts.
        tokens: Their tokens, without special tokens and prompt.
        dropped_tokens: Tokens cut off by `long_texts="truncate"`.
        unknown_tokens: Tokens that the model's vocabulary does not know.
        padding: Padded tokens that carried nothing, over those that did.
        batches: Batches that ran.
        ooms: Batches that ran out of memory and were retried in parts.
        token_limit: The limit of a batch at the end, in padded tokens.
        seconds: From the model being ready to the last record saved.
        total_seconds: From the start of the process, never more than a stopwatch outside says.
        tokens_per_second: `tokens / seconds`.
        peak_rss_bytes: Most resident memory of the process so far.
        device, backend, dtype, model: What computed.
        save_path: Where the results are; None if nothing was written.
        stopped: The run was stopped before its input ended; the same call goes on with it.
    """

    texts: int = 0
    embedded: int = 0
    cached: int = 0
    duplicates: int = 0
    failed: int = 0
    others: int | None = None
    skipped: int = 0
    blank: int = 0
    chunks: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    padding: float = 0.0
    batches: int = 0
    ooms: int = 0
    token_limit: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_rss_bytes: int = 0
    device: str = ""
    backend: str = ""
    dtype: str = ""
    model: str = ""
    save_path: str | None = None
    stopped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, as `--json` prints them."""
        return asdict(self)


def process_seconds() -> float:
    """Seconds since this process was started, never more than passed."""
    if sys.platform != "linux":
        return max(0.0, time.time() - psutil.Process().create_time())
    # There psutil counts from the time of the boot in whole seconds. The 22nd field counts ticks, cut off, since then.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - (int(fields[19]) + 1) / os.sysconf("SC_CLK_TCK"))
