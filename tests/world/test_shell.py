"""What a shell, a service or cron makes of the programs' surroundings: each ends well or in one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncembed import open_embeddings
from tests.cli.running import ENVIRONMENT, PROGRAM, ROOT, run

FULL = Path("/dev/full")


def shell(script: str, folder: Path, program: list[str] = PROGRAM, **more: str) -> subprocess.CompletedProcess[str]:
    """A line of shell in which `run` is the program."""
    head = f'run() {{ {" ".join(program)} "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", head + script],
        cwd=folder, env={**ENVIRONMENT, **more}, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, errors="surrogateescape",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in.txt").write_text("a heron on the river\na boat at the mooring\n")
    return tmp_path


def test_total_seconds_is_no_more_than_a_stopwatch_says(folder: Path) -> None:
    began = time.monotonic()
    done = run("in.txt", "--json", folder=folder)
    assert 0 < json.loads(done.stdout)["total_seconds"] <= time.monotonic() - began


def test_run_without_any_standard_stream_does_its_work(folder: Path) -> None:
    done = shell("run in.txt <&- >&- 2>&-", folder)
    assert done.returncode == 0
    assert len(list(open_embeddings(folder / "data"))) == 2  # each is read and checked: no line strayed into a file
    assert json.loads((folder / "data" / "embeddings_index.json").read_bytes())["n_completed"] == 2


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full here")
@pytest.mark.parametrize("module", ["asyncembed", "asyncembed.cli.store", "asyncembed.server"])
def test_mistake_that_cannot_be_told_for_a_full_disk_keeps_its_exit_code(module: str, folder: Path) -> None:
    assert shell("run --no-such-option 2>/dev/full", folder, [sys.executable, "-m", module]).returncode == 2


@pytest.mark.parametrize("streams", ["2>&-", "<&-"])
def test_mistake_with_a_closed_stream_keeps_its_exit_code(streams: str, folder: Path) -> None:
    done = shell(f"run - {streams}", folder)
    assert done.returncode == 2
    assert done.stderr == ("" if "2" in streams else "asyncembed: error: standard input is closed; name a file\n")


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full here")
def test_numbers_for_a_full_disk_end_in_one_line_with_the_work_saved(folder: Path) -> None:
    done = shell("run in.txt --json --quiet >/dev/full", folder, PYTHONUNBUFFERED="1")
    assert done.returncode == 3
    assert done.stderr == (
        "asyncembed: error: standard output cannot be written to: No space left on device; what was saved stays\n"
    )
    assert len(open_embeddings(folder / "data")) == 2


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full here")
@pytest.mark.parametrize("module", ["asyncembed", "asyncembed.cli.store", "asyncembed.server"])
def test_help_of_each_program_for_a_full_disk_or_a_reader_that_leaves_is_no_bug(module: str, folder: Path) -> None:
    program = [sys.executable, "-m", module]
    full = shell("run --help >/dev/full", folder, program)
    assert full.returncode == 3
    assert "error: standard output cannot be written to: No space left on device" in full.stderr
    assert full.stderr.count("\n") == 1
    assert shell("run --help | true", folder, program).stderr == ""
    closed = shell("run --help >&- 2>&- <&-", folder, program)
    assert closed.returncode == 0


def test_names_that_are_no_text_in_a_locale_of_ascii_are_read_written_and_shown(folder: Path) -> None:
    name, target = b"n\xff\xc3\xa4.txt", b"o\xfe"
    os.rename(os.fsencode(folder) + b"/in.txt", os.fsencode(folder) + b"/" + name)
    done = shell(r"run $'n\xff\xc3\xa4.txt' -o $'o\xfe'", folder, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert "2 embedded" in done.stdout
    assert r"open_embeddings('o\udcfe')" in done.stdout
    assert len(open_embeddings(os.fsdecode(os.fsencode(folder) + b"/" + target))) == 2


@pytest.mark.parametrize("arguments", ["", "-o there", "--dry-run"])
def test_relative_folder_in_a_removed_working_directory_exits_3_and_says_so(arguments: str, folder: Path) -> None:
    done = shell(f"mkdir gone; cd gone; rmdir ../gone; run {folder}/in.txt {arguments}", folder)
    assert done.returncode == 3
    assert "the working directory was removed; change to another, or give an absolute path" in done.stderr
    assert "bug" not in done.stderr


def test_terminal_without_a_width_shows_help_and_progress(folder: Path) -> None:
    if shutil.which("script") is None:
        pytest.skip("nothing here makes a terminal")
    done = shell(f"script -qec 'stty cols 0 rows 0; {' '.join(PROGRAM)} in.txt' /dev/null", folder)
    assert done.returncode == 0, done.stdout
    assert "2 embedded" in done.stdout
    assert "Traceback" not in done.stdout


def test_run_with_an_empty_environment_isolated_and_optimised_embeds(folder: Path) -> None:
    clean = ["env", "-i", f"XDG_CACHE_HOME={os.environ['XDG_CACHE_HOME']}", sys.executable, "-I", "-OO"]
    if subprocess.run([*clean, "-c", "import asyncembed"], check=False, cwd="/").returncode:
        pytest.skip("asyncembed is not installed here")
    done = shell("run in.txt", folder, [*clean, "-m", "asyncembed"])
    assert done.returncode == 0, done.stderr
    assert "2 embedded" in done.stdout


def test_user_without_a_home_gets_vectors(folder: Path) -> None:
    without_home = ["unshare", "--user", "--map-user=12345", "env", "-i", f"PYTHONPATH={ROOT}"]
    if shutil.which("unshare") is None or subprocess.run([*without_home, "true"], check=False).returncode:
        pytest.skip("no right to be another user here")
    script = (
        "import asyncio\nfrom asyncembed import embed_stream\nfrom tests.fakes import FakeEncoder\n"
        "async def main():\n    print(len(await embed_stream(['one', 'two'], model=FakeEncoder())))\n"
        "asyncio.run(main())"
    )
    done = subprocess.run(
        [*without_home, sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"
    assert {path.name for path in folder.iterdir()} == {"in.txt", "data"}
