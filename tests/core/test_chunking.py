"""Chunking with the real tokenizer of all-MiniLM-L6-v2: nothing too long, nothing lost, nothing cut in silence."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_text_splitters import CharacterTextSplitter, RecursiveCharacterTextSplitter

from asyncembed.encoders.base import Tokenized
from asyncembed.encoders.tokenizers import FastTokenizer
from asyncembed.engine import chunking
from asyncembed.engine.chunking import HEAD_SECTIONS, SECTION_CHARS, Chunker, TokenCounter, sections
from asyncembed.engine.work import Client, Work
from asyncembed.errors import OptionsError
from asyncembed.options import LongTexts
from asyncembed.wording import plural

from .minilm import MAX_TOKENS, N_SPECIAL, chunker, fast_tokenizer, rust_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised. "
PARAGRAPHS = "".join(f"Paragraph {n} of the story. {SENTENCE * (n % 7 + 1)}\n\n" for n in range(80))

_characters = st.characters(codec="utf-8")
_long_words = st.builds(lambda letter, n: letter * n, _characters, st.integers(90, 400))
_words = st.one_of(
    st.text(_characters, max_size=12),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=5, max_size=200),
    st.text(st.sampled_from("😀🎉👩‍👩‍👧🏔️"), min_size=1, max_size=80),
    st.text(st.sampled_from("abcdefgh"), min_size=1, max_size=110),
    st.text(st.sampled_from(" \t\n\u3000\u00a0"), min_size=1, max_size=40),
    st.sampled_from(["한국어로", "quick", "0x1f2e", "[SEP]", "[UNK]", "3.14159", "。", "é", "e\u0301", "#?!"]),
    _long_words,
)
_texts = st.lists(_words, max_size=60).flatmap(lambda words: st.sampled_from([" ".join(words), "".join(words)]))


def chunk_all(made_by: Chunker, texts: Sequence[str]) -> list[Work]:
    works = [Work(Client(), text) for text in texts]
    made_by.chunk(works)
    return works


def chunk_one(made_by: Chunker, text: str) -> Work:
    return chunk_all(made_by, [text])[0]


def own_ids(text: str) -> list[int]:
    return rust_tokenizer().encode(text).ids


def squeezed(text: str) -> str:
    return "".join(text.split())


def n_content(text: str) -> int:
    return len(rust_tokenizer().encode(text, add_special_tokens=False).ids)


# --- texts that fit ---


@settings(deadline=None)
@given(text=st.text(_characters, max_size=100))
def test_chunk_text_that_fits_is_one_chunk_with_the_tokenizers_ids(text: str) -> None:
    result = chunk_one(chunker(), text)
    if result.error is not None:
        return
    (only,) = result.chunks
    assert only.ids.tolist() == own_ids(text)
    assert (only.text, only.start, only.work, only.ordinal) == (text, 0, result, 0)
    assert only.n_tokens == result.n_tokens == len(only.ids) - N_SPECIAL
    assert result.dropped_tokens == 0


@pytest.mark.parametrize("n_words", [MAX_TOKENS - N_SPECIAL - 1, MAX_TOKENS - N_SPECIAL, MAX_TOKENS - N_SPECIAL + 1])
def test_chunk_text_at_the_edge_is_one_chunk_if_it_fits(n_words: int) -> None:
    result = chunk_one(chunker(), " ".join(["dog"] * n_words))
    assert (len(result.chunks) == 1) == (n_words <= MAX_TOKENS - N_SPECIAL)
    assert result.n_tokens == n_words


def test_chunk_micro_batch_gives_one_result_each_in_order() -> None:
    texts = ["one", "", SENTENCE * 30, "two"]
    results = chunk_all(chunker(), texts)
    assert [len(result.chunks) for result in results] == [1, 0, len(results[2].chunks), 1]
    assert len(results[2].chunks) > 1
    for result in results:
        assert [piece.work for piece in result.chunks] == [result] * len(result.chunks)
        assert [piece.ordinal for piece in result.chunks] == list(range(len(result.chunks)))


# --- long texts ---


def check_split(result: Work, text: str, max_tokens: int) -> None:
    """Chunks fit, stand where they say, and what lies between them or in two of them has no tokens."""
    end = 0
    for piece in result.chunks:
        assert len(piece.ids) <= max_tokens
        assert piece.ids.tolist() == own_ids(piece.text)
        assert text[piece.start : piece.start + len(piece.text)] == piece.text
        assert n_content(text[min(end, piece.start) : max(end, piece.start)]) == 0
        end = piece.start + len(piece.text)
    assert n_content(text[end:]) == 0


@settings(deadline=None, max_examples=150)
@given(text=_texts, max_tokens=st.sampled_from([8, 16, 64, MAX_TOKENS]))
@example(text="word " * 2000, max_tokens=MAX_TOKENS)
@example(text="天气很好" * 500, max_tokens=MAX_TOKENS)
@example(text="👩‍👩‍👧" * 500, max_tokens=16)
@example(text="a" * 5000 + " end", max_tokens=8)
def test_chunk_any_text_no_chunk_is_too_long_and_no_token_is_lost(text: str, max_tokens: int) -> None:
    result = chunk_one(chunker(max_tokens), text)
    if result.error is not None:
        assert result.chunks == ()
        nothing_known = [own for own in own_ids(text)[1:-1] if own != rust_tokenizer().token_to_id("[UNK]")] == []
        assert not text.strip() or nothing_known
        return
    check_split(result, text, max_tokens)
    assert result.n_tokens == sum(piece.n_tokens for piece in result.chunks)
    assert result.dropped_tokens == 0


@pytest.mark.parametrize(
    "text",
    [PARAGRAPHS, SENTENCE * 100, "天气很好我们去公园散步。" * 300, "line\n" * 1000, "a-b_c.d/" * 500],
    ids=["paragraphs", "repeated", "chinese", "lines", "code"],
)
def test_chunk_long_text_chunks_in_a_row_are_the_text(text: str) -> None:
    result = chunk_one(chunker(), text)
    assert len(result.chunks) > 1
    assert squeezed("".join(piece.text for piece in result.chunks)) == squeezed(text)
    check_split(result, text, MAX_TOKENS)


def test_chunk_long_prose_is_cut_at_the_ends_of_sentences() -> None:
    result = chunk_one(chunker(), SENTENCE * 100)
    assert {piece.text.rstrip()[-1] for piece in result.chunks} == {"."}


def test_chunk_cjk_without_any_separator_is_cut_between_characters_in_full_chunks() -> None:
    result = chunk_one(chunker(), "天" * 1000)
    assert [piece.n_tokens for piece in result.chunks] == [254, 254, 254, 238]


def test_chunk_two_megabytes_end_and_lose_nothing() -> None:
    text = (PARAGRAPHS * (2_000_000 // len(PARAGRAPHS) + 1))[:2_000_000]
    result = chunk_one(chunker(), text)
    assert result.error is None
    assert squeezed("".join(piece.text for piece in result.chunks)) == squeezed(text)
    assert max(len(piece.ids) for piece in result.chunks) <= MAX_TOKENS
    assert all(text.startswith(piece.text, piece.start) for piece in result.chunks)
    assert all(a.start + len(a.text) <= b.start for a, b in pairwise(result.chunks))


# --- overlap and size ---


@pytest.mark.parametrize("overlap", [1, 10, 40])
def test_chunk_overlap_neighbours_share_tokens_and_starts_are_right(overlap: int) -> None:
    text = " ".join(f"number{n}" for n in range(700))
    result = chunk_one(chunker(chunk_size=100, chunk_overlap=overlap), text)
    assert max(piece.n_tokens for piece in result.chunks) <= 100
    shared = []
    for before, after in pairwise(result.chunks):
        assert text.startswith(after.text, after.start)
        assert before.start < after.start <= before.start + len(before.text) + 1
        shared.append(n_content(text[after.start : before.start + len(before.text)]))
    assert max(shared) <= overlap
    assert overlap < 10 or min(shared) > 0
    last = result.chunks[-1]
    assert last.start + len(last.text) == len(text)


def test_chunk_overlap_text_of_one_repeated_word_has_right_starts() -> None:
    text = "word " * 1000
    result = chunk_one(chunker(chunk_size=100, chunk_overlap=10), text)
    assert [piece.start // 5 for piece in result.chunks] == [90 * number for number in range(len(result.chunks))]


def test_chunk_size_is_kept_and_weights_add_up() -> None:
    result = chunk_one(chunker(chunk_size=20), SENTENCE * 20)
    assert max(piece.n_tokens for piece in result.chunks) <= 20
    assert result.n_tokens == n_content(SENTENCE * 20)


def test_chunker_size_beyond_the_model_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"chunk_size=255 is more than the 254 tokens .*2 special and 0 of the prom"):
        chunker(chunk_size=255)
    assert chunker(chunk_size=254).chunk_size == chunker().chunk_size == 254


@pytest.mark.parametrize("settings_", [{"chunk_size": 50, "chunk_overlap": 50}, {"chunk_overlap": 254}])
def test_chunker_overlap_not_smaller_than_a_chunk_is_refused(settings_: dict[str, int]) -> None:
    with pytest.raises(OptionsError, match="chunk_overlap"):
        chunker(**settings_)


# --- truncation and refusal ---


@pytest.mark.parametrize("text", [PARAGRAPHS, "天气很好" * 300, "word " * 254, "word " * 255])
def test_chunk_truncate_gives_the_ids_of_the_librarys_own_truncation(text: str) -> None:
    result = chunk_one(chunker(long_texts="truncate"), text)
    cutting = copy.deepcopy(rust_tokenizer())
    cutting.enable_truncation(MAX_TOKENS)
    (only,) = result.chunks
    assert only.ids.tolist() == cutting.encode(text).ids
    assert only.n_tokens == result.n_tokens == min(254, n_content(text))
    assert result.dropped_tokens == max(0, n_content(text) - 254)


def test_chunk_truncate_with_prompt_and_size_counts_what_it_drops() -> None:
    made_by = chunker(long_texts="truncate", prompt="query: ", chunk_size=10)
    result = chunk_one(made_by, "dog " * 25)
    assert result.chunks[0].ids.tolist() == own_ids("query: " + "dog " * 10)
    assert (result.n_tokens, result.dropped_tokens) == (10, 15)


def test_chunk_error_mode_fails_long_texts_only() -> None:
    made_by = chunker(long_texts="error")
    assert chunk_one(made_by, "dog " * 255).error == "the text has 255 tokens; a chunk takes 254"
    assert chunk_one(made_by, "dog " * 254).error is None


# --- prompts ---


def test_chunk_prompt_is_in_the_ids_and_not_in_the_count() -> None:
    result = chunk_one(chunker(prompt="query: "), "a good dog")
    (only,) = result.chunks
    assert only.ids.tolist() == own_ids("query: a good dog")
    assert (only.text, only.n_tokens) == ("a good dog", 3)


def test_chunk_prompt_is_before_every_chunk_of_a_long_text() -> None:
    result = chunk_one(chunker(prompt="passage: "), PARAGRAPHS)
    for piece in result.chunks:
        assert piece.ids.tolist() == own_ids("passage: " + piece.text)
        assert len(piece.ids) <= MAX_TOKENS
        assert piece.n_tokens == n_content(piece.text)


def test_chunker_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"the prompt takes 8 tokens, and the model only 10 in all"):
        chunker(10, prompt="one two three four five six seven: ")
    assert chunker(11, prompt="one two three four five six seven: ").chunk_size == 1


def test_chunk_prompt_with_unknown_tokens_does_not_fail_the_text() -> None:
    made_by = chunker(prompt="\U0001fae0: ")
    result = chunk_one(made_by, "dog")
    assert (result.error, result.unknown_tokens) == (None, 0)
    assert chunk_one(made_by, "\U0001fae0").error == "the model's vocabulary knows none of the text's 1 token"
    assert chunk_one(made_by, "dog \U0001fae0 " * 200).unknown_tokens == 200


def test_chunk_prompt_that_grows_into_the_text_does_not_lose_it() -> None:
    result = chunk_one(chunker(prompt="re"), "port")
    assert result.error is None
    assert result.chunks[0].ids.tolist() == own_ids("report")
    assert result.n_tokens == 1
    assert chunk_one(chunker(prompt="re"), " \n").error == "the text has no tokens"


# --- texts that cannot be embedded, and unknown tokens ---


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000", "\u200b", "\x00\x01"])
def test_chunk_blank_text_fails(text: str, prompt: str) -> None:
    result = chunk_one(chunker(prompt=prompt), text)
    assert (result.chunks, result.n_tokens, result.error) == ((), 0, "the text has no tokens")


def test_chunk_lone_surrogate_fails_alone_and_its_neighbours_pass() -> None:
    texts = ["before", "a \ud83d b", "after", "\udc00", SENTENCE * 30]
    results = chunk_all(chunker(), texts)
    reason = "the text holds a lone surrogate, which no tokenizer takes"
    assert [result.error for result in results] == [None, reason, None, reason, None]
    assert results[0].chunks[0].ids.tolist() == own_ids("before")
    check_split(results[4], texts[4], MAX_TOKENS)


@pytest.mark.parametrize(("text", "n_tokens"), [("a" * 10_000, 1), ("วันนี้อากาศดีมาก", 1), ("\U0001fae0 \U0001fae0", 2)])
def test_chunk_text_of_nothing_but_unknown_tokens_fails_with_that_reason(text: str, n_tokens: int) -> None:
    result = chunk_one(chunker(), text)
    assert result.error == f"the model's vocabulary knows none of the text's {plural(n_tokens, 'token')}"
    assert result.unknown_tokens == n_tokens


def test_chunk_unknown_tokens_are_counted() -> None:
    assert chunk_one(chunker(), "dog " + "a" * 10_000 + " cat \U0001fae0").unknown_tokens == 2
    long = chunk_one(chunker(), "dog \U0001fae0 " * 300)
    assert len(long.chunks) > 1
    assert long.unknown_tokens == 300


# --- splitters of the caller's own ---


def recursive(**settings_: object) -> RecursiveCharacterTextSplitter:
    return RecursiveCharacterTextSplitter(**settings_)


def test_chunk_recursive_splitter_counting_tokens_is_asked_for_long_texts_only() -> None:
    asked: list[str] = []

    class Recording(RecursiveCharacterTextSplitter):
        def split_text(self, text: str) -> list[str]:
            asked.append(text)
            return super().split_text(text)

    counter = TokenCounter(fast_tokenizer())
    splitter = Recording(chunk_size=30, chunk_overlap=0, length_function=counter)
    made_by = chunker(splitter=splitter)
    assert len(chunk_one(made_by, "dog " * 30).chunks) == 1
    assert asked == []
    result = chunk_one(made_by, SENTENCE * 10)
    assert asked != []
    assert len(result.chunks) > 5
    assert max(piece.n_tokens for piece in result.chunks) <= 30
    check_split(result, SENTENCE * 10, 32)


def test_chunk_recursive_splitter_with_overlap_has_right_starts() -> None:
    counter = TokenCounter(fast_tokenizer())
    splitter = recursive(chunk_size=100, chunk_overlap=10, length_function=counter)
    result = chunk_one(chunker(splitter=splitter), "word " * 1000)
    assert [piece.start // 5 for piece in result.chunks] == [90 * number for number in range(len(result.chunks))]


def test_chunk_splitter_counting_characters_is_asked_for_every_text() -> None:
    splitter = CharacterTextSplitter(separator=" ", chunk_size=20, chunk_overlap=0)
    text = "a good dog ran over the green hill and home"
    result = chunk_one(chunker(splitter=splitter), text)
    assert [piece.text for piece in result.chunks] == splitter.split_text(text)
    assert len(result.chunks) > 1
    check_split(result, text, MAX_TOKENS)


@pytest.mark.parametrize("counts_tokens", [True, False])
def test_chunk_splitter_with_chunks_too_large_for_the_model_is_cut_again(counts_tokens: bool) -> None:
    function: Callable[[str], int] = TokenCounter(fast_tokenizer()) if counts_tokens else len
    splitter = recursive(chunk_size=5000, chunk_overlap=0, length_function=function)
    assert max(n_content(piece) for piece in splitter.split_text(PARAGRAPHS)) > MAX_TOKENS
    result = chunk_one(chunker(splitter=splitter), PARAGRAPHS)
    check_split(result, PARAGRAPHS, MAX_TOKENS)
    assert squeezed("".join(piece.text for piece in result.chunks)) == squeezed(PARAGRAPHS)


class Rewriting:
    """A splitter whose pieces are not in the text."""

    def split_text(self, text: str) -> list[str]:
        return [word.upper() for word in text.split()]


class Empty:
    """A splitter that leaves nothing."""

    def split_text(self, text: str) -> list[str]:
        return []


def test_chunk_splitter_that_rewrites_its_pieces_is_taken_at_its_word() -> None:
    result = chunk_one(chunker(splitter=Rewriting()), "dog cat bird")
    assert [piece.text for piece in result.chunks] == ["DOG", "CAT", "BIRD"]
    assert all(0 <= piece.start <= len("dog cat bird") for piece in result.chunks)


def test_chunk_splitter_that_leaves_nothing_fails_the_text() -> None:
    assert chunk_one(chunker(splitter=Empty()), "dog").error == "the splitter left nothing of the text"


# --- counting and identity ---


def test_token_counter_counts_without_special_tokens_and_remembers() -> None:
    count = TokenCounter(fast_tokenizer())
    assert [count("a good dog"), count("a good dog"), count(""), count(SENTENCE)] == [3, 3, 0, n_content(SENTENCE)]


def test_fast_tokenizer_is_a_copy_without_truncation_and_padding() -> None:
    cutting = copy.deepcopy(rust_tokenizer())
    cutting.enable_truncation(5)
    cutting.enable_padding(length=20)
    own = FastTokenizer(cutting, "[UNK]")
    (found,) = own.tokenize(["dog " * 9])
    assert (len(found.ids), found.n_prefix, found.n_suffix, found.n_content) == (11, 1, 1, 9)
    assert own.spans("a good dog") == [(0, 1), (2, 6), (7, 10)]
    assert len(cutting.encode("dog " * 9).ids) == 20


def fingerprints(*made_by: Chunker) -> list[str]:
    return [json.dumps(each.fingerprint(), sort_keys=True) for each in made_by]


def test_fingerprint_equal_settings_agree_and_each_setting_counts() -> None:
    def by_tokens(**settings_: int) -> Chunker:
        counter = TokenCounter(fast_tokenizer())
        return chunker(splitter=recursive(length_function=counter, **settings_))

    different: Sequence[Callable[[], Chunker]] = [
        lambda: chunker(),
        lambda: chunker(chunk_size=100),
        lambda: chunker(chunk_size=100, chunk_overlap=5),
        lambda: chunker(long_texts="truncate"),
        lambda: by_tokens(chunk_size=100, chunk_overlap=0),
        lambda: by_tokens(chunk_size=90, chunk_overlap=0),
        lambda: by_tokens(chunk_size=100, chunk_overlap=9),
        lambda: chunker(splitter=recursive(chunk_size=100, chunk_overlap=0)),
        lambda: chunker(splitter=recursive(chunk_size=100, chunk_overlap=0, separators=["\n", " "])),
        lambda: chunker(splitter=CharacterTextSplitter(separator=" ", chunk_size=100, chunk_overlap=0)),
        lambda: chunker(splitter=Rewriting()),
    ]
    once = fingerprints(*(make() for make in different))
    assert len(set(once)) == len(different)
    assert fingerprints(*(make() for make in different)) == once
    used = different[4]()
    chunk_one(used, PARAGRAPHS)
    assert fingerprints(used) == [once[4]]  # work leaves no trace in it


_FINGERPRINT_SCRIPT = """
import json, sys
from langchain_text_splitters import RecursiveCharacterTextSplitter
from asyncembed.engine.chunking import TokenCounter
from tests.core.minilm import chunker, fast_tokenizer
splitter = RecursiveCharacterTextSplitter(
    chunk_size=100, chunk_overlap=9, length_function=TokenCounter(fast_tokenizer())
)
sys.stdout.write(json.dumps(chunker(splitter=splitter).fingerprint(), sort_keys=True))
"""


def test_fingerprint_is_the_same_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", _FINGERPRINT_SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for seed in ("1", "2")
    }
    splitter = recursive(chunk_size=100, chunk_overlap=9, length_function=TokenCounter(fast_tokenizer()))
    assert found == set(fingerprints(chunker(splitter=splitter)))


ENDLESS = 3 * SECTION_CHARS


@pytest.mark.parametrize("long_texts", get_args(LongTexts))
@pytest.mark.parametrize("text", ["x" * ENDLESS, "x" * (ENDLESS + 50), "数" * ENDLESS, "x" * ENDLESS + " \n" * ENDLESS])
def test_chunk_endless_text_of_unknown_tokens_fails_with_that_reason(text: str, long_texts: LongTexts) -> None:
    """Also where a section's rest would be short enough to look like a word that is known."""
    found = chunk_one(chunker(long_texts=long_texts), text)
    assert found.error is not None
    assert "knows none" in found.error
    assert found.unknown_tokens > 0


@pytest.mark.parametrize("long_texts", get_args(LongTexts))
@pytest.mark.parametrize("text", [" " * ENDLESS, "\n\t" * ENDLESS, "\x01" * ENDLESS, "\0 " * ENDLESS])
def test_chunk_endless_text_without_tokens_fails_with_that_reason(text: str, long_texts: LongTexts) -> None:
    assert chunk_one(chunker(long_texts=long_texts), text).error == "the text has no tokens"


@pytest.mark.parametrize("long_texts", get_args(LongTexts))
def test_chunk_words_after_megabytes_of_blanks_are_found(long_texts: LongTexts) -> None:
    found = chunk_one(chunker(long_texts=long_texts), " " * 20 * SECTION_CHARS + "a heron on the river")
    alone = chunk_one(chunker(), "a heron on the river")
    assert found.error is None
    assert [ids for chunk in found.chunks for ids in chunk.ids] == [ids for chunk in alone.chunks for ids in chunk.ids]


def test_chunk_truncated_endless_word_after_known_ones_is_never_tokenised_as_a_whole() -> None:
    lengths: list[int] = []

    class Watched(FastTokenizer):
        def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
            lengths.extend(map(len, texts))
            return super().tokenize(texts)

    tokenizer = Watched(rust_tokenizer(), "[UNK]")
    found = chunk_one(Chunker(tokenizer, 256, long_texts="truncate"), "a heron " + "x" * 40 * SECTION_CHARS)
    assert found.error is None
    assert found.dropped_tokens == 24  # of the 40 parts of the word, those behind the first million characters
    assert max(lengths) <= (HEAD_SECTIONS + 1) * SECTION_CHARS


@given(text=st.text(alphabet="x \n。", max_size=300))
def test_sections_are_the_text_and_none_is_short_inside_a_word(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "SECTION_CHARS", 20)
        parts = sections(text)
    assert "".join(parts) == text
    assert all(len(part) <= 31 for part in parts)
    for before, after in pairwise(parts):
        assert before[-1:] in " \n" or after[:1] in " \n" or len(after.split(" ")[0].split("\n")[0]) >= 10
