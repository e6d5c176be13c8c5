"""What is shown while a run goes on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.cli.console import Display, in_words
from asyncembed.cli.run import share_done
from asyncembed.sources import read_texts


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        return True


def test_lines_come_at_the_start_after_ten_seconds_and_every_thirty() -> None:
    clock, file = Clock(), io.StringIO()
    lines = Display(file, clock=clock)
    lines.loading("the model m")
    clock.now += 8
    lines.started("embedding a.txt")
    shown_at = []
    for second in range(100):
        before = file.tell()
        assert lines.due() == (second in (10, 40, 70))
        lines.update(second / 200, f"{second} texts")
        shown_at += [second] * (file.tell() > before)
        clock.now += 1
    assert shown_at == [10, 40, 70]
    assert file.getvalue().splitlines() == [
        "asyncembed: loading the model m …",
        "asyncembed: embedding a.txt",
        "asyncembed: 5%, 10 texts, about 3 min 10 s left",
        "asyncembed: 20%, 40 texts, about 2 min 40 s left",
        "asyncembed: 35%, 70 texts, about 2 min 10 s left",
    ]


def test_lines_hold_no_control_characters_and_no_estimate_without_a_length() -> None:
    clock, file = Clock(), io.StringIO()
    lines = Display(file, clock=clock)
    clock.now += 60
    lines.update(None, "7 texts")
    assert file.getvalue() == "asyncembed: 7 texts\n"


def test_a_bar_never_says_100_percent_before_the_end() -> None:
    file, clock = Terminal(), Clock()
    bar = Display(file, clock=clock)
    bar.loading("the model m")
    bar.started("embedding a.txt")
    bar.update(0.5, "5 texts")
    clock.now += 1
    bar.update(1.0, "10 texts")
    bar.write("a line above")
    bar.close()
    assert "loading the model m" in file.getvalue()
    assert " 50%|" in file.getvalue()
    assert "5 texts" in file.getvalue()
    assert " 99%|" in file.getvalue()
    assert "100%" not in file.getvalue()
    assert "a line above\n" in file.getvalue()


def test_a_bar_without_a_known_length_shows_the_words_only() -> None:
    file = Terminal()
    bar = Display(file)
    bar.update(None, "5 texts")
    bar.close()
    assert "5 texts" in file.getvalue()
    assert "%" not in file.getvalue()


def test_nothing_is_shown_when_quiet_but_lines() -> None:
    file = io.StringIO()
    silent = Display(file, quiet=True)
    silent.loading("m")
    silent.started("a.txt")
    silent.update(0.5, "5 texts")
    assert not silent.due()
    silent.write("a warning")
    assert file.getvalue() == "a warning\n"


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_standard_error_that_is_gone_ends_no_run(kind: type[io.StringIO], quiet: bool) -> None:
    file = kind()
    shown = Display(file, quiet=quiet)
    shown.started("a.txt")
    file.close()
    shown.update(0.5, "5 texts")
    shown.write("a warning")
    shown.close()


def test_the_share_done_counts_results_and_not_what_was_read_ahead(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\nfour\n")
    with read_texts(path) as texts:
        assert share_done(texts, 0, None) == 0
        assert len(list(texts)) == 4
        assert texts.bytes_read == texts.bytes_total
        assert share_done(texts, 1, None) == 0.25
        assert share_done(texts, 4, None) == 1


def test_the_share_done_of_a_limited_run_is_of_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\n" * 100_000)
    with read_texts(path, limit=4) as texts:
        assert len(list(texts)) == 4
        assert share_done(texts, 2, 4) == 0.5


def test_the_share_done_of_a_stream_without_length_is_unknown() -> None:
    with read_texts(io.BufferedReader(Endless()), limit=None) as texts:
        next(texts)
        assert share_done(texts, 1, None) is None


class Endless(io.RawIOBase):
    """A pipe that never ends."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what BufferedReader passes
        buffer[:5] = b"text\n"
        return 5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"),
     (273_600, "3 d 4 h")],
)  # fmt: skip
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@given(st.floats(0, 1e9))
def test_every_time_has_words(seconds: float) -> None:
    assert in_words(seconds)[-1].isalpha()
