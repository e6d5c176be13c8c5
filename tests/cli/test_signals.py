"""Ctrl-C and SIGTERM at every stage of the program's life, without a model."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.cli.running import started, wait_for

IDLE = """
import sys
from asyncembed.cli.signals import Signals
Signals().install()
print("ready", flush=True)
sys.stdin.read()
"""

RUNNING = """
import asyncio, sys
from asyncembed.cli.signals import Signals
signals = Signals()
signals.install()

async def run(stopped):
    print("ready", flush=True)
    await stopped.wait()

async def main():
    stopped = asyncio.Event()
    def stop():
        print("asked to stop", signals.name, flush=True)
        if "heed" in sys.argv:
            stopped.set()
    with signals.stopping(asyncio.get_running_loop(), stop):
        await run(stopped)

asyncio.run(main())
sys.exit(signals.exit_code)
"""

BOTH = pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)


@BOTH
def test_a_signal_with_nothing_under_way_ends_the_program_in_one_line(
    number: int, code: int, name: str, tmp_path: Path
) -> None:
    with started(sys.executable, "-c", IDLE, folder=tmp_path) as process:
        wait_for(process.stdout, "ready")
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code
    assert errors.strip() == f"asyncembed: stopped by {name}"


@BOTH
def test_the_first_signal_of_a_run_asks_it_to_stop(number: int, code: int, name: str, tmp_path: Path) -> None:
    with started(sys.executable, "-c", RUNNING, "heed", folder=tmp_path) as process:
        wait_for(process.stdout, "ready")
        process.send_signal(number)
        wait_for(process.stdout, f"asked to stop {name}")
        _, errors = process.communicate()
    assert process.returncode == code
    assert errors == ""


@BOTH
def test_the_second_signal_of_a_run_ends_the_program(number: int, code: int, name: str, tmp_path: Path) -> None:
    with started(sys.executable, "-c", RUNNING, folder=tmp_path) as process:
        wait_for(process.stdout, "ready")
        process.send_signal(number)
        wait_for(process.stdout, f"asked to stop {name}")
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code
    assert "what was saved stays" in errors
    assert "Traceback" not in errors


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{IDLE}"
    with started(sys.executable, "-c", ignoring, folder=tmp_path) as process:
        wait_for(process.stdout, "ready")
        process.send_signal(signal.SIGINT)
        process.communicate("")
    assert process.returncode == 0
