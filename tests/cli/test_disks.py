"""Whole runs on disks that fill, refuse or vanish: one line that says what to do, exit code 3, and the way back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed import open_embeddings
from tests.cli.running import ENVIRONMENT, PROGRAM, run, started, wait_for

NOBODY = 65534


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"note number {n}\n" for n in range(150)))
    return path


def in_namespace(script: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """What each run of the program in a shell script with mounts of its own said; `run` runs it over the notes."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a file system here")
    program = " ".join(f"'{word}'" for word in PROGRAM)
    head = (
        f"n=0\nrun() {{ n=$((n+1)); c=0; {program} notes.txt -o disk/data -q 2>err.$n || c=$?; echo $c >code.$n; }}\n"
    )
    done = subprocess.run(
        [*unshare, "sh", "-ec", head + script],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = []
    for n in range(1, 1 + len(list(folder.glob("code.*")))):
        code, errors = int((folder / f"code.{n}").read_text()), (folder / f"err.{n}").read_text()
        assert "Traceback" not in errors
        found.append(subprocess.CompletedProcess(PROGRAM, code, done.stdout, errors))
    return found


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what went wrong."""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("asyncembed: error: "))
    return line


def test_a_full_disk_exits_3_tears_nothing_and_with_more_room_the_run_goes_on(tmp_path: Path, notes: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=600k tmpfs disk\nrun\n"
        "cp -r disk/data full\n"
        "mount -o remount,size=8m disk\nrun\ncp -r disk/data mended\numount disk\n"
    )
    full, mended = in_namespace(script, tmp_path)
    assert full.returncode == 3
    assert "No space left on device; free some space and run the same command again: what is saved stays" in the_error(
        full
    )
    saved = list(open_embeddings(tmp_path / "full"))  # reading checks each
    assert 0 < len(saved) < 150
    assert not list((tmp_path / "full").rglob("*.tmp"))
    assert mended.returncode == 0, mended.stderr
    assert len(list(open_embeddings(tmp_path / "mended"))) == 150
    index = json.loads((tmp_path / "mended" / "embeddings_index.json").read_bytes())
    assert index["n_completed"] == 150


def test_a_read_only_disk_exits_3_with_what_to_do(tmp_path: Path, notes: Path) -> None:
    (tmp_path / "disk" / "data").mkdir(parents=True)
    script = "mount --bind disk disk\nmount -o remount,bind,ro disk\nrun\n"
    (refused,) = in_namespace(script, tmp_path)
    assert refused.returncode == 3
    assert "Read-only file system; choose another save path, or get the right to write to this one" in the_error(
        refused
    )
    assert list((tmp_path / "disk" / "data").iterdir()) == []


def test_a_folder_of_somebody_else_is_refused_with_what_to_do(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can run a process as somebody else")
    script = (
        "import os, sys\nfrom asyncembed.store.files import StorePaths\n"
        "from asyncembed.store.writer import FolderWriter\n"
        f"os.setuid({NOBODY})\nwriter = FolderWriter(StorePaths.of(sys.argv[1]))\n"
        "try:\n    writer.open()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "finally:\n    writer.close(complete=False)\n"
    )
    for folder in (tmp_path / "none" / "data", tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            cwd="/", env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.startswith("StoreError"), done.stderr
        assert "Permission denied; choose another save path, or get the right to write to this one" in done.stdout


def test_a_file_in_the_place_of_the_folder_exits_3_before_anything_is_read(tmp_path: Path, notes: Path) -> None:
    (tmp_path / "data").write_text("a file")
    done = run("notes.txt", folder=tmp_path)
    assert done.returncode == 3
    assert "it has to be a folder; choose another save path" in the_error(done)
    assert "loaded" not in done.stderr
    assert (tmp_path / "data").read_text() == "a file"


def test_a_folder_removed_in_the_middle_exits_3_and_the_same_command_starts_anew(tmp_path: Path) -> None:
    texts = [f"text number {n} of a stream\n" for n in range(40)]
    with started(*PROGRAM, "-", "--verbose", folder=tmp_path) as process:
        assert process.stdin is not None
        process.stdin.writelines(texts[:20])
        process.stdin.flush()
        wait_for(process.stderr, "the first results are saved")
        (tmp_path / "data").rename(tmp_path / "gone")  # in one step: the job writes on meanwhile
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        _, errors = process.communicate("".join(texts[20:]))
    assert process.returncode == 3
    assert "the folder was moved or removed; put it back, or run the same command again" in errors
    assert "saved before that" not in errors
    done = run("-", folder=tmp_path, stdin="".join(texts))
    assert done.returncode == 0, done.stderr
    assert len(list(open_embeddings(tmp_path / "data"))) == 40
