"""The end of a run: words, advice, exit codes."""

from __future__ import annotations

import sys
from dataclasses import replace

import click
import pytest

from asyncembed.cli.console import Exit, describe, exit_code_of
from asyncembed.cli.run import advice, is_complete, summary_lines
from asyncembed.errors import (
    ClosedError,
    ModelError,
    OptionsError,
    SourceError,
    StoreLockedError,
    StoreMismatchError,
    TextsFailedError,
)
from asyncembed.records import Summary

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def words(summary: Summary) -> str:
    return "\n".join(summary_lines(summary, "notes.csv"))


def test_the_first_line_says_what_became_of_the_texts() -> None:
    summary = Summary(texts=1310, embedded=1200, cached=50, duplicates=59, failed=1)
    assert words(summary) == "notes.csv: 1,310 texts: 1,200 embedded, 50 already there, 59 repeats, 1 failed"


def test_nothing_computed_again_is_said_plainly() -> None:
    assert words(Summary(texts=3, cached=3)) == (
        "notes.csv: all 3 texts were there already; nothing was computed again"
    )
    assert "(1 repeat among them)" in words(Summary(texts=3, cached=2, duplicates=1))


def test_the_numbers_and_the_way_back_are_told() -> None:
    shown = words(
        Summary(
            texts=2, embedded=2, chunks=3, tokens=3000, batches=1, padding=0.05, seconds=2.0, tokens_per_second=1500.0,
            model="m", device="cpu", backend="torch", dtype="float32", save_path="out", ooms=1, skipped=3, blank=1,
        )
    )  # fmt: skip
    assert "3,000 tokens in 3 chunks and 1 batch, 2.0 s (1,500 tokens/s), 5.0% padding; m on cpu" in shown
    assert "1 blank row and 2 bad rows skipped" in shown
    assert "memory ran out 1 time" in shown
    assert "saved in out" in shown
    assert "from asyncembed import open_embeddings; ids, vectors = open_embeddings('out').to_numpy()" in shown


def test_a_stopped_run_says_how_it_goes_on() -> None:
    assert "the same command goes on from there" in words(Summary(texts=1, embedded=1, stopped=True))
    assert words(Summary(stopped=True)).startswith("notes.csv: no text was done\n")


@pytest.mark.parametrize(
    ("summary", "complete"),
    [
        (Summary(texts=1, embedded=1), True),
        (Summary(texts=1, embedded=1, skipped=2, blank=2), True),
        (Summary(texts=1, embedded=1, skipped=2, blank=1), False),
        (Summary(texts=2, embedded=1, failed=1), False),
        (Summary(texts=1, failed=1), False),
    ],
)
def test_a_run_is_complete_if_nothing_failed_or_was_skipped_but_blanks(summary: Summary, complete: bool) -> None:
    assert is_complete(summary) is complete


def test_advice_says_what_to_do_about_failures() -> None:
    [line] = advice(Summary(texts=5, failed=2, skipped=3, blank=2, save_path="out"))
    assert line == (
        "2 texts failed and 1 bad row skipped: out/errors.jsonl says which and why; "
        "the same command tries failed texts again"
    )
    assert list(advice(Summary(texts=5, embedded=5))) == []


def test_advice_warns_of_what_was_cut_off_and_of_many_unknown_tokens() -> None:
    [cut] = advice(Summary(texts=1, embedded=1, tokens=256, dropped_tokens=1000))
    assert "1,000 tokens of long texts were cut off" in cut
    [unknown] = advice(Summary(texts=9, embedded=9, chunks=9, tokens=1000, unknown_tokens=100))
    assert "100 tokens unknown to the model, beside 1,000 embedded" in unknown
    assert list(advice(Summary(texts=9, embedded=9, chunks=9, tokens=10_000, unknown_tokens=100))) == []
    assert list(advice(Summary(texts=9, cached=9, unknown_tokens=100))) == []  # of a text that failed again


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (click.UsageError("what?"), Exit.USAGE),
        (OptionsError("chunk_size"), Exit.USAGE),
        (SourceError("a.csv:3"), Exit.USAGE),
        (TextsFailedError("a text, with on_error=raise"), Exit.INCOMPLETE),
        (StoreLockedError("locked"), Exit.CANNOT),
        (StoreMismatchError("other model"), Exit.CANNOT),
        (ModelError("device dead"), Exit.CANNOT),
        (ClosedError("closed"), Exit.CANNOT),
        (ValueError("a bug"), Exit.CANNOT),
        (ExceptionGroup("two", [ValueError("x"), SourceError("a.csv:3")]), Exit.USAGE),
    ],
)
def test_every_error_has_its_exit_code(error: Exception, code: Exit) -> None:
    assert exit_code_of(error) == code


def test_a_known_error_is_its_message_in_one_line() -> None:
    assert describe(SourceError("a.csv:3: bad\nrow"), False) == "a.csv:3: bad row"


def test_a_bug_is_named_and_says_how_to_see_more() -> None:
    line = describe(ValueError("no\nsuch thing"), False)
    assert line.startswith("unexpected ValueError: no such thing; --verbose shows where")
    assert "--verbose" not in describe(ValueError("no such thing"), True)


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"float32", "bfloat16", "int8"}, "--dtype bfloat16"), ({"float32", "int8"}, "--dtype int8"), ({"float32"}, None)],
)
def test_long_job_says_which_precision_would_be_faster(
    able: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.encoders.openvino_encoder.supported_dtypes", lambda: able)
    job = Summary(texts=9, embedded=9, seconds=60.0, backend="openvino", dtype="float32")
    assert [line.split(" (")[0] for line in advice(job)] == ([expected] if expected else [])
    for other in ({"seconds": 59.0}, {"dtype": "bfloat16"}, {"backend": "torch"}):
        assert list(advice(replace(job, **other))) == []
