"""Every command and every block of code in the README runs, in the order it stands there, in one folder."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from asyncembed import EmbedOptions
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(kind, code) for kind, code in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S) if kind != "text"]
IS_THIS_RUN = "bin/test"  # the command that runs this very test


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, so that what the commands write lands in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("bin", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    return folder


def test_readme_has_commands_and_code() -> None:
    assert [kind for kind, _ in BLOCKS].count("bash") >= 4
    assert [kind for kind, _ in BLOCKS].count("python") >= 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(checkout: Path, number: int) -> None:
    kind, code = BLOCKS[number]
    if code.strip() == IS_THIS_RUN:
        assert (ROOT / IS_THIS_RUN).stat().st_mode & 0o111
        return
    if kind == "python":
        command = [sys.executable, "-W", "error", "-c", code]
    else:
        command = ["bash", "-e", "-o", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(300)
def test_first_command_a_second_time_computes_nothing_and_says_so(checkout: Path) -> None:
    command = ["bash", "-c", next(code for kind, code in BLOCKS if kind == "bash")]
    subprocess.run(command, cwd=checkout, capture_output=True, check=True)
    again = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    assert "nothing was computed again" in again.stdout


def test_every_option_stands_in_the_table() -> None:
    table = README.split("## Options")[1].split("\n## ")[0]
    rows = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == {field.name for field in fields(EmbedOptions)}
