"""The journal: whole lines count, torn ones do not, wherever they were torn."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncembed.records import text_id
from asyncembed.sinks.entries import completed_line, fold
from asyncembed.sinks.header import Header
from asyncembed.sinks.journal import Journal, journal_by_id, journal_header, journal_lines

HEADER = Header.of({"weights": "abc"}, {"backend": "torch"})


def _line(number: int) -> bytes:
    return completed_line(text_id(str(number)), number, 1, 50, f"key {number}")


def _folded(path: str) -> dict[str, object]:
    return {raw.decode(): entry for raw, lines in journal_by_id(path) if (entry := fold(None, lines)) is not None}


def test_journal_torn_at_every_byte_of_its_tail_keeps_the_lines_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "i.journal"
    journal = Journal(str(path))
    journal.start(HEADER)
    journal.append(_line(0) + _line(1))
    journal.close()
    whole = path.read_bytes()
    for end in range(len(whole) - len(_line(1)), len(whole) + 1):
        path.write_bytes(whole[:end])
        again = Journal(str(path))
        again.start(HEADER)
        again.append(_line(2))
        again.close()
        found = _folded(str(path))
        complete = end >= len(whole) - 1  # only the line's end is missing
        assert set(found) == {text_id("0"), text_id("2"), *([text_id("1")] if complete else [])}
        assert journal_header(str(path)) == HEADER


def test_journal_torn_at_every_byte_of_its_header_takes_lines(tmp_path: Path) -> None:
    path = tmp_path / "i.journal"
    header = HEADER.encoded()
    for end in range(len(header)):
        path.write_bytes(header[:end])
        assert journal_header(str(path)) is None
        journal = Journal(str(path))
        journal.start(HEADER)
        journal.append(_line(0))
        journal.close()
        assert set(_folded(str(path))) == {text_id("0")}


def test_journal_by_id_gives_ids_ascending_and_lines_in_order(tmp_path: Path) -> None:
    path = str(tmp_path / "i.journal")
    journal = Journal(path)
    journal.start(HEADER)
    numbers = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    journal.append(b"".join(_line(number) for number in numbers))
    journal.close()
    grouped = list(journal_by_id(path))
    assert [raw for raw, _ in grouped] == sorted({text_id(str(number)).encode() for number in numbers})
    assert sum(len(lines) for _, lines in grouped) == len(numbers) == len(list(journal_lines(path)))


def test_journal_by_id_equal_first_words_are_told_apart(tmp_path: Path) -> None:
    path = str(tmp_path / "i.journal")
    one, other = "a" * 16 + "1" * 48, "a" * 16 + "0" * 48
    journal = Journal(path)
    journal.start(HEADER)
    journal.append(b"".join(completed_line(identity, 1, 1, 1, None) for identity in (one, other, one)))
    journal.close()
    assert [(raw.decode(), len(lines)) for raw, lines in journal_by_id(path)] == [(other, 1), (one, 2)]


def test_journal_missing_or_empty_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "i.journal"
    assert (list(journal_by_id(str(path))), list(journal_lines(str(path))), journal_header(str(path))) == ([], [], None)
    path.write_bytes(b"")
    assert (list(journal_by_id(str(path))), list(journal_lines(str(path))), journal_header(str(path))) == ([], [], None)


def test_journal_append_before_start_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="bug"):
        Journal(str(tmp_path / "i.journal")).append(b"x\n")
