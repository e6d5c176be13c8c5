"""A text that kills the process costs a few runs, not every run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.core.test_limit_memory import child


def test_job_text_that_kills_every_run_fails_alone_after_two_deaths(tmp_path: Path) -> None:
    """Real processes, the real model and a real SIGKILL whenever a row of more than 200 tokens runs."""
    folder = str(tmp_path / "out")
    codes = []
    while not codes or (codes[-1] != 0 and len(codes) < 8):
        done = child("deadly", folder, "200", "0", "0")
        codes.append(done.returncode)
    assert codes[:-1] == [-9] * (len(codes) - 1)
    assert 3 <= len(codes) <= 5, (codes, done.stderr)
    found = json.loads(done.stdout)
    assert (found["texts"], found["failed"]) == (9, 1)
    (reason,) = found["errors"]
    assert "two runs were killed while a chunk" in reason

    # Another chunk size makes other chunks; a limit of one's own is one's own risk.
    assert json.loads(child("deadly", folder, "200", "0", "0").stdout)["failed"] == 1
    assert child("deadly", folder, "200", "1024", "0").returncode == -9
    cut = json.loads(child("deadly", str(tmp_path / "cut"), "200", "0", "100").stdout)
    assert (cut["embedded"], cut["failed"]) == (9, 0)
