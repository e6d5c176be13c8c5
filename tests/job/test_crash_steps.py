"""A job killed at every step of what it does to the disk, and its successor too: nothing torn, lost or doubled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from asyncembed import text_id
from tests.conftest import ROOT
from tests.job.stepping import TEXTS

ALL = sorted(text_id(text) for text in TEXTS)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_kill_at_every_step_tears_nothing_loses_nothing_and_doubles_only_what_was_in_flight(
    tmp_path: Path, durability: str
) -> None:
    command = [sys.executable, "-m", "tests.job.stepping", str(tmp_path), durability]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *kills, undisturbed = [json.loads(line) for line in done.stdout.splitlines()]
    assert undisturbed["runs"][0]["status"] == 0
    assert len(kills) >= 30
    for kill in kills:
        first, last = kill["runs"][0], kill["runs"][-1]
        assert first["status"] == signal.SIGKILL, kill
        assert last["status"] == 0, kill
        saved_before: set[str] = set()
        computed_before = 0
        for run in kill["runs"]:
            assert run["torn"] == [], kill
            assert saved_before <= set(run["whole"]), kill  # what was there stays
            computed_now = run["computed"][computed_before:]
            assert not saved_before & set(computed_now), kill  # and is not computed again
            assert max(Counter(computed_now).values(), default=1) == 1, kill
            saved_before, computed_before = set(run["whole"]), len(run["computed"])
        assert last["whole"] == kill["index"] == ALL, kill
        assert set(kill["rest"]) - {".lock"} == {"embeddings_data", "ledger.sqlite"}, kill
    in_flight = {len(set(kill["runs"][0]["computed"]) - set(kill["runs"][0]["whole"])) for kill in kills}
    assert max(in_flight) > 0  # some of the kills did fall between the model and the disk
