"""The parts of the dry run that need no model."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncembed.cli.dry_run import Plan, free_space, in_bytes
from asyncembed.errors import StoreError


def test_the_room_for_a_folder_that_is_not_there_is_that_of_the_one_above(tmp_path: Path) -> None:
    n_bytes, n_files = free_space(tmp_path / "not" / "there")
    assert n_bytes > 0
    assert n_files is None or n_files > 0
    assert not (tmp_path / "not").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        free_space(tmp_path / "file" / "data")


def plan(**more: object) -> Plan:
    numbers: dict[str, object] = {
        "texts": 12, "to_embed": 10, "chunks": 11, "tokens": 500, "bytes": 5_000_000_000, "files": 18,
        "free_bytes": 9_000_000_000, "free_files": 100, "save_path": "out", "model": "m", "seconds": 65.0,
        "tokens_per_second": 7.7, "measured_tokens": 400, "load_seconds": 8.0,
    }  # fmt: skip
    return Plan(**{**numbers, **more})  # type: ignore[arg-type]  # numbers of several kinds


def test_the_words_give_time_and_room_and_how_they_are_known() -> None:
    shown = "\n".join(plan(repeats=1, cached=1, blank=2).lines("notes.csv"))
    assert shown.startswith("Dry run: nothing was embedded or written.")
    assert "notes.csv: 12 texts, 1 repeat, 2 blank rows" in shown
    assert "1 of them are in out so far" in shown
    assert "about 1 min 5 s after 8.0 s of loading: 8 tokens/s, measured on 400 tokens here" in shown
    assert "about 5.0 GB in 18 files; free: 9.0 GB and 100 files" in shown
    assert list(plan().warnings()) == []


def test_what_stands_in_the_way_is_warned_of() -> None:
    assert "will not fit" in next(plan(fits=False).warnings())
    [line] = plan(would_fail=2, first_failure="the text has no tokens").warnings()
    assert line == "2 texts would fail, the first because the text has no tokens"
    [line] = plan(dropped_tokens=1).warnings()
    assert "1 token of long texts would be cut off" in line


def test_an_unknown_time_is_said_to_be_unknown() -> None:
    assert "unknown" in "\n".join(plan(seconds=None).lines("notes.csv"))


def test_as_json_the_plan_says_that_it_is_one() -> None:
    assert plan().as_dict()["dry_run"] is True


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 bytes"), (512, "512 bytes"), (1_640_000, "1.6 MB"), (12 * 10**9, "12 GB"), (2 * 10**15, "2,000 TB")],
)
def test_amounts_are_told_in_words(number: int, words: str) -> None:
    assert in_bytes(number) == words
