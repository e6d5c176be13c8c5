"""What a shell, a service or cron makes of the command line's surroundings: each ends well or in one clear line."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.cli.running import run


def test_total_seconds_is_no_more_than_a_stopwatch_says(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a heron on the river\n")
    began = time.monotonic()
    done = run("in.txt", "--json", folder=tmp_path)
    assert 0 < json.loads(done.stdout)["total_seconds"] <= time.monotonic() - began
