"""Help, version and mistakes: answered at once, in one line, without anything heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import ENVIRONMENT, PROGRAM, run

HEAVY = ("torch", "transformers", "sentence_transformers", "langchain_text_splitters", "tqdm")
NOT_FOR_PARSING = (*HEAVY, "numpy", "anyio", "asyncembed.stream")

PROBE = """
import sys
from asyncembed.cli import main
sys.argv = ["asyncembed", *sys.argv[1:]]
try:
    code = main()
except SystemExit as end:
    code = end.code
print("code", code, "modules", *sorted(sys.modules))
"""


def modules_after(*arguments: str, folder: Path) -> tuple[str, set[str]]:
    """The exit code, and what was imported until then."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, code, _, *modules = done.stdout.splitlines()[-1].split()
    return code, set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--no-such-option"], ["a.txt", "--batch-size", "0"]])
def test_parsing_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code, modules = modules_after(*arguments, folder=tmp_path)
    assert code == ("2" if len(arguments) > 1 or "no-such" in arguments[0] else "0")
    assert modules.isdisjoint(NOT_FOR_PARSING)


@pytest.mark.parametrize("arguments", [["missing.csv"], ["notes.csv", "--column", "nope"], ["notes.txt", "--header"]])
def test_an_input_that_cannot_be_is_refused_before_anything_heavy_is_imported(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.csv").write_text("text\none\n")
    (tmp_path / "notes.txt").write_text("one\n")
    code, modules = modules_after(*arguments, folder=tmp_path)
    assert code == "2"
    assert modules.isdisjoint(HEAVY)


def test_help_and_version_exit_0(tmp_path: Path) -> None:
    shown = run("--help", folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Usage: asyncembed [OPTIONS] INPUT\n")
    version = run("--version", folder=tmp_path)
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.startswith("asyncembed ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no input is named"),
        (["--colum", "x"], "--column"),
        (["missing.csv"], "there is no such file"),
        (["."], "is a directory"),
        (["notes.dat"], "--input-format"),
        (["empty.txt"], "it is empty"),
        (["notes.csv", "--column", "body"], "no column 'body'; there are 'text'"),
        (["notes.csv", "--chunk-size", "4", "--chunk-overlap", "4"], "chunk_overlap=4"),
        (["notes.csv", "-o", ""], "save_path is empty"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text\none\n")
    (tmp_path / "notes.dat").write_text("one\n")
    (tmp_path / "empty.txt").write_text("")
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("asyncembed: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_reader_of_the_help_that_goes_away_causes_no_traceback(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*PROGRAM, "--help"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
