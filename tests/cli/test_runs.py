"""Whole runs of the program with the real model."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from asyncembed.store import open_embeddings
from asyncembed.store.files import StorePaths, make_folders
from asyncembed.store.lock import FolderLock
from tests.cli.running import ENVIRONMENT, PROGRAM, run, started, wait_for

CONTRACT = (
    "texts embedded cached duplicates failed skipped chunks tokens dropped_tokens unknown_tokens padding batches ooms "
    "token_limit seconds total_seconds tokens_per_second peak_rss_bytes device backend dtype model save_path"
)

ROWS = ["text,n", *(f"This is note number {n},{n}" for n in range(17)), "This is note number 3,17", " ,18", "龘龘龘,19"]
"""17 texts, a repeat, a blank cell, and one of which the model knows nothing."""


def the_object(stdout: str) -> dict[str, Any]:
    """The JSON object that is all of standard output."""
    assert stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "notes.csv").write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dry_run(folder: Path) -> subprocess.CompletedProcess[str]:
    """Before anything was run: the folder must still be empty."""
    done = run("notes.csv", "--header", "--dry-run", "--json", folder=folder)
    assert not (folder / "data").exists()
    return done


@pytest.fixture(scope="module")
def first_run(folder: Path, dry_run: object) -> subprocess.CompletedProcess[str]:
    return run("notes.csv", "--header", "--json", folder=folder)


def test_a_dry_run_counts_and_writes_nothing(dry_run: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert dry_run.returncode == 0
    plan = the_object(dry_run.stdout)
    assert (plan["texts"], plan["repeats"], plan["blank"], plan["cached"]) == (19, 1, 1, 0)
    assert (plan["to_embed"], plan["chunks"], plan["would_fail"]) == (17, 17, 1)
    assert plan["seconds"] > 0
    assert plan["measured_tokens"] >= plan["tokens"]
    assert plan["fits"] is True
    assert plan["bytes"] > 17 * 384 * 8
    assert "vocabulary knows none" in dry_run.stderr


def test_a_run_prints_one_object_with_the_agreed_fields(first_run: subprocess.CompletedProcess[str]) -> None:
    numbers = the_object(first_run.stdout)
    assert set(numbers) >= set(CONTRACT.split())
    assert numbers["texts"] == 19
    assert (numbers["embedded"], numbers["duplicates"], numbers["failed"], numbers["cached"]) == (17, 1, 1, 0)
    assert (numbers["skipped"], numbers["blank"]) == (1, 1)
    assert numbers["error"] is None


def test_a_run_in_which_a_text_fails_exits_1_and_says_where_to_look(
    first_run: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert first_run.returncode == 1
    assert "1 text failed: data/errors.jsonl says which and why" in first_run.stderr
    assert (folder / "data" / "errors.jsonl").read_text().count("\n") == 1


def test_progress_away_from_a_terminal_is_plain_lines(first_run: subprocess.CompletedProcess[str]) -> None:
    assert "loading the model all-MiniLM-L6-v2" in first_run.stderr
    assert "embedding notes.csv into data" in first_run.stderr
    assert all(line.startswith("asyncembed: ") for line in first_run.stderr.splitlines())
    assert all(character == "\n" or character.isprintable() for character in first_run.stderr)


def test_the_plan_and_the_run_agree(
    dry_run: subprocess.CompletedProcess[str], first_run: subprocess.CompletedProcess[str]
) -> None:
    plan, numbers = the_object(dry_run.stdout), the_object(first_run.stdout)
    assert (plan["to_embed"], plan["tokens"], plan["chunks"]) == (
        numbers["embedded"], numbers["tokens"], numbers["chunks"],
    )  # fmt: skip


def test_a_second_run_computes_nothing_again_and_exits_0(first_run: object, folder: Path) -> None:
    (folder / "good.txt").write_text("".join(f"This is note number {n}\n" for n in range(17)))
    done = run("good.txt", folder=folder)
    assert done.returncode == 0
    assert "all 17 texts were there already; nothing was computed again" in done.stdout
    assert "open_embeddings('data').to_numpy()" in done.stdout


def test_a_run_or_a_dry_run_that_would_change_the_vectors_is_refused_alike(first_run: object, folder: Path) -> None:
    before = (folder / "data" / "embeddings_index.json").read_bytes()
    for change in (["--normalize-embeddings"], ["--chunk-size", "32"]):
        said = []
        for more in ([], ["--dry-run"]):
            done = run("notes.csv", "--header", *change, *more, folder=folder)
            assert done.returncode == 3
            said.append(done.stderr.splitlines()[-1])
        assert said[0] == said[1]
        assert f"{change[0].strip('-').replace('-', '_')} is " in said[0]
        assert "overwrite" in said[0]
    assert (folder / "data" / "embeddings_index.json").read_bytes() == before


def test_a_reader_of_the_summary_that_goes_away_changes_nothing(first_run: object, folder: Path) -> None:
    (folder / "one.txt").write_text("This is note number 1\n")
    with subprocess.Popen(
        [*PROGRAM, "one.txt"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "Broken" not in errors
    assert "Traceback" not in errors


def test_a_locked_folder_exits_3_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text\n")
    paths = StorePaths.of(tmp_path / "data")
    make_folders(paths)
    lock = FolderLock(paths)
    lock.acquire()
    try:
        done = run("a.txt", "--json", folder=tmp_path)
    finally:
        lock.release()
    assert done.returncode == 3
    assert "asyncembed: error: " in done.stderr
    assert "is writing to it" in done.stderr
    assert "loaded" not in done.stderr
    assert "is writing to it" in the_object(done.stdout)["error"]


def test_a_bad_row_in_the_middle_exits_2_and_keeps_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n" + b" " * 2**17 + b"\n\xff bad\nfour\n")  # beyond the first rows
    done = run("a.txt", "--json", folder=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("asyncembed: error: a.txt:4: ")
    assert "saved before that: 2 texts" in done.stderr
    assert the_object(done.stdout)["error"] in last
    assert len(open_embeddings(tmp_path / "data")) == 2


def test_sigterm_saves_what_is_done_and_the_same_command_goes_on(tmp_path: Path) -> None:
    texts = [f"This is text number {n} of a stream\n" for n in range(40)]
    with started(*PROGRAM, "-", "--json", "--verbose", folder=tmp_path) as process:
        assert process.stdin is not None
        process.stdin.writelines(texts)
        process.stdin.flush()  # and left open: the run cannot end by itself
        wait_for(process.stderr, "the first results are saved")
        process.send_signal(signal.SIGTERM)
        wait_for(process.stderr, "SIGTERM: finishing the batch in hand")
        assert process.stdout is not None
        stdout = process.stdout.read()
        assert process.wait() == 143
    numbers = the_object(stdout)
    assert numbers["stopped"] is True
    assert 1 <= numbers["embedded"] <= 40
    saved = open_embeddings(tmp_path / "data")
    assert len(saved) == numbers["embedded"]
    index = json.loads((tmp_path / "data" / "embeddings_index.json").read_bytes())
    assert sorted(index["texts"]) == saved.ids()  # complete: the next start has nothing to repair
    assert not (tmp_path / "data" / "ledger.sqlite-wal").exists()
    lock = FolderLock(StorePaths.of(tmp_path / "data"))
    lock.acquire()
    lock.release()

    done = run("-", "--json", folder=tmp_path, stdin="".join(texts))
    assert done.returncode == 0
    rest = the_object(done.stdout)
    assert rest["cached"] == numbers["embedded"]
    assert rest["texts"] == len(saved) == 40


def test_ctrl_c_in_the_middle_of_a_file_exits_130_and_frees_the_folder(tmp_path: Path) -> None:
    texts = "".join(f"{n} rivers and mountains and gardens and winters and {n % 97} more words\n" for n in range(8000))
    (tmp_path / "many.txt").write_text(texts)
    with started(*PROGRAM, "many.txt", "--verbose", folder=tmp_path) as process:
        wait_for(process.stderr, "the first results are saved")
        process.send_signal(signal.SIGINT)
        stdout, errors = process.communicate()
    assert process.returncode == 130
    assert "Ctrl-C: finishing the batch in hand; press again to leave at once" in errors
    assert "Traceback" not in errors
    assert "the same command goes on from there" in stdout
    saved = open_embeddings(tmp_path / "data")
    assert 1 <= len(saved) < 8000
    assert all(len(stored.embedding) == 384 for stored in saved)
    lock = FolderLock(StorePaths.of(tmp_path / "data"))
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("more", [["--json"], ["--dry-run"]])
def test_a_signal_while_the_model_is_loading_is_not_kept_waiting_by_it(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text\n")
    with started(*PROGRAM, "a.txt", *more, folder=tmp_path) as process:
        wait_for(process.stderr, "loading the model")
        process.send_signal(signal.SIGTERM)
        stdout, errors = process.communicate()
    assert process.returncode == 143
    assert "loaded" not in errors
    assert "Traceback" not in errors
    if more == ["--json"]:
        assert the_object(stdout)["stopped"] is True
        lock = FolderLock(StorePaths.of(tmp_path / "data"))
        lock.acquire()
        lock.release()
    else:
        assert not (tmp_path / "data").exists()
