"""The words of messages."""

from __future__ import annotations

from typing import Any

import pytest

from asyncembed.wording import first_line, kind_of, plural, why_no_text


def test_plural_one_is_alone() -> None:
    assert [plural(number, "text") for number in (0, 1, 2, 2000)] == ["0 texts", "1 text", "2 texts", "2,000 texts"]
    assert plural(2, "batch", "batches") == "2 batches"


@pytest.mark.parametrize(
    ("value", "words"), [(1, "an int"), ([], "a list"), (None, "None"), (b"", "bytes"), (bytearray(), "a bytearray")]
)
def test_kind_of_has_the_article_that_fits(value: Any, words: str) -> None:
    assert kind_of(value) == words


def test_why_no_text_of_bytes_says_what_to_do() -> None:
    assert why_no_text("item 3", b"a") == "item 3 is bytes, not a str; decode it first"
    assert why_no_text("item 3", 1.5) == "item 3 is a float, not a str"


@pytest.mark.parametrize(
    ("said", "line"), [("one", "one"), ("\n one \ntwo", "one"), ("", "ValueError"), (" \n", "ValueError")]
)
def test_first_line_of_an_error_is_what_it_says_or_its_kind(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line
