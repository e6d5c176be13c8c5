"""Options: what cannot be is refused at once, by name and with what would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.errors import AsyncEmbedError, OptionsError
from asyncembed.options import DEFAULT_MODEL, DEFAULT_SAVE_PATH, EmbedOptions, parse_bytes


@pytest.mark.parametrize(
    ("written", "n_bytes"),
    [
        (1, 1),
        (5_000_000_000, 5_000_000_000),
        ("1", 1),
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2 G", 2 * 10**9),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("512mi", 512 << 20),
        ("1.5g", 1_500_000_000),
        ("0.5 KiB", 512),
        ("10B", 10),
        ("3k", 3000),
        ("1TiB", 1 << 40),
        (" 7 ", 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse_bytes_amount_is_understood(written: int | str, n_bytes: int) -> None:
    assert parse_bytes(written) == n_bytes


@pytest.mark.parametrize(
    "written", ["", "G", "lots", "-1", "2 XB", "1e9", "1,5g", "2ib", "0", "0.1", "٣ nothing", 0, -5, True, 1.5, None]
)
def test_parse_bytes_no_amount_is_refused(written: Any) -> None:
    with pytest.raises(OptionsError, match="amount of memory"):
        parse_bytes(written)


@given(written=st.text(max_size=20) | st.from_regex(r"\A\d{1,400}(\.\d{1,400})? ?[kmgtKMGT]?i?B?\Z"))
def test_parse_bytes_any_text_is_an_amount_or_refused(written: str) -> None:
    try:
        n_bytes = parse_bytes(written)
    except OptionsError:
        return
    assert isinstance(n_bytes, int)
    assert n_bytes > 0


def test_options_defaults_are_valid() -> None:
    options = EmbedOptions()
    assert (options.model, options.folder) == (DEFAULT_MODEL, Path(DEFAULT_SAVE_PATH))
    assert options.max_memory_bytes is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "tensorflow"),
        ("dtype", "int4"),
        ("dtype", None),
        ("long_texts", "cut"),
        ("on_error", "ignore"),
        ("on_bad_row", "keep"),
        ("input_format", "xml"),
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 2.0),
        ("batch_size", True),
        ("batch_size", "8"),
        ("token_limit", 0),
        ("chunk_size", 0),
        ("truncate_dim", 0),
        ("truncate_dim", 1.5),
        ("normalize_embeddings", 1),
        ("ordered", "yes"),
        ("overwrite", None),
        ("header", 0),
        ("trust_remote_code", "no"),
        ("allow_pickle", 1),
        ("chunk_overlap", -1),
        ("chunk_overlap", 0.5),
        ("chunk_overlap", True),
        ("device", ""),
        ("device", None),
        ("device", 0),
        ("save_path", ""),
        ("save_path", 5),
        ("save_path", b"data"),
        ("prompt", 5),
        ("prompt_name", b"query"),
        ("column", 1),
        ("max_memory_usage", 0),
        ("max_memory_usage", "plenty"),
        ("max_memory_usage", 1.5),
    ],
)
def test_options_impossible_value_is_refused_with_what_was_seen(name: str, value: Any) -> None:
    with pytest.raises(OptionsError) as raised:
        EmbedOptions(**{name: value})
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, AsyncEmbedError)
    assert name in str(raised.value) or "amount of memory" in str(raised.value) or "one of" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "torch"),
        ("dtype", "bfloat16"),
        ("long_texts", "truncate"),
        ("long_texts", "error"),
        ("on_error", "raise"),
        ("on_bad_row", "skip"),
        ("input_format", "csv"),
        ("batch_size", 1),
        ("token_limit", 1),
        ("chunk_size", 1),
        ("truncate_dim", 1),
        ("ordered", True),
        ("device", "cuda:1"),
        ("save_path", None),
        ("save_path", Path("somewhere")),
        ("prompt", ""),
        ("column", "text"),
        ("max_memory_usage", "1GB"),
    ],
)
def test_options_possible_value_is_kept(name: str, value: Any) -> None:
    assert getattr(EmbedOptions(**{name: value}), name) == value


@pytest.mark.parametrize("overlap", [10, 11])
def test_options_overlap_not_smaller_than_the_chunk_is_refused(overlap: int) -> None:
    with pytest.raises(OptionsError, match=rf"chunk_overlap={overlap} must be smaller than chunk_size=10"):
        EmbedOptions(chunk_size=10, chunk_overlap=overlap)
    assert EmbedOptions(chunk_size=10, chunk_overlap=9).chunk_overlap == 9


def test_options_memory_and_folder_are_derived() -> None:
    options = EmbedOptions(max_memory_usage="2MiB", save_path=None)
    assert options.max_memory_bytes == 2 << 20
    assert options.folder is None


def test_options_from_kwargs_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(OptionsError, match=r"unknown option 'batchsize'; there are .*batch_size"):
        EmbedOptions.from_kwargs(batchsize=8)
    assert EmbedOptions.from_kwargs(batch_size=8) == EmbedOptions(batch_size=8)


def test_options_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        EmbedOptions().batch_size = 3  # type: ignore[misc]  # that is what is tested
