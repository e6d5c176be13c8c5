"""From arguments to a request."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner

from asyncembed.cli.options import ENTRIES, PROGRAMMATIC, Request
from asyncembed.cli.program import command, parse
from asyncembed.errors import OptionsError
from asyncembed.options import EmbedOptions, InputFormat, LongTexts


def parsed(*arguments: str) -> Request:
    request = parse(arguments)
    assert isinstance(request, Request)
    return request


def option(name: str) -> click.Option:
    return next(p for p in command.params if p.name == name and isinstance(p, click.Option))


def test_every_field_of_the_options_has_an_option_with_help() -> None:
    names = {field.name for field in fields(EmbedOptions)}
    assert set(ENTRIES) == names - PROGRAMMATIC
    assert names >= PROGRAMMATIC
    for name in ENTRIES:
        assert option(name).help, name
        dashed = f"--{name.replace('_', '-')}"
        assert dashed in option(name).opts, name


def test_every_option_is_shown_by_help_under_a_heading() -> None:
    shown = CliRunner().invoke(command, ["--help"]).output
    for param in command.params:
        if isinstance(param, click.Option):
            assert all(name in shown for name in param.opts), param.opts
    for heading in ("Input:", "Output:", "Model:", "Examples:", "Exit codes:"):
        assert f"\n{heading}\n" in shown
    assert shown.index("Exit codes:") > shown.index("Examples:")


def test_without_options_the_defaults_are_those_of_the_library() -> None:
    request = parsed("notes.csv")
    assert request == Request(input="notes.csv", options=EmbedOptions())


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("-o out", "save_path", "out"),
        ("--save-path out", "save_path", "out"),
        ("-m some/model", "model", "some/model"),
        ("--model some/model", "model", "some/model"),
        ("--model-path some/model", "model", "some/model"),
        ("-d cuda:1", "device", "cuda:1"),
        ("--device mps", "device", "mps"),
        ("--dtype float16", "dtype", "float16"),
        ("--backend torch", "backend", "torch"),
        ("--batch-size 8", "batch_size", 8),
        ("--token-limit 512", "token_limit", 512),
        ("--max-memory-usage 2GB", "max_memory_usage", "2GB"),
        ("--max-memory-usage 1048576", "max_memory_usage", "1048576"),
        ("--chunk-size 32 --chunk-overlap 4", "chunk_overlap", 4),
        ("--long-texts truncate", "long_texts", "truncate"),
        ("--prompt query:", "prompt", "query:"),
        ("--prompt-name query", "prompt_name", "query"),
        ("--normalize-embeddings", "normalize_embeddings", True),
        ("--truncate-dim 64", "truncate_dim", 64),
        ("--on-error raise", "on_error", "raise"),
        ("--on-bad-row skip", "on_bad_row", "skip"),
        ("--overwrite", "overwrite", True),
        ("--trust-remote-code", "trust_remote_code", True),
        ("--allow-pickle", "allow_pickle", True),
        ("--input-format csv", "input_format", "csv"),
        ("--column body", "column", "body"),
        ("--header", "header", True),
    ],
)
def test_an_option_sets_its_field(arguments: str, name: str, value: Any) -> None:
    assert getattr(parsed("notes.csv", *arguments.split()).options, name) == value


def test_the_programs_own_options_are_part_of_the_request() -> None:
    request = parsed("-i", "notes.csv", "--limit", "5", "--dry-run", "--json", "-q", "-v")
    assert request == Request(
        input="notes.csv", options=EmbedOptions(), limit=5, dry_run=True, as_json=True, quiet=True, verbose=True
    )


def test_the_input_may_be_standard_input() -> None:
    assert parsed("-").input == parsed("--input-file", "-").input == "-"


def test_choices_are_those_of_the_library() -> None:
    for name, kind in (("long_texts", LongTexts), ("input_format", InputFormat)):
        choice = option(name).type
        assert isinstance(choice, click.Choice)
        assert tuple(choice.choices) == get_args(kind)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "no input is named"),
        ("a.txt -i b.txt", "two inputs are named"),
        ("a.txt b.txt", "b.txt"),
        ("a.txt --colum text", "--column"),
        ("a.txt --batch-size 0", "--batch-size"),
        ("a.txt --batch-size many", "many"),
        ("a.txt --long-texts cut", "average"),
        ("a.txt --max-memory-usage 2XB", "2GB"),
        ("a.txt --limit 0", "--limit"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_seen(arguments: str, words: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        parse(arguments.split())
    assert words in refused.value.format_message()


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(OptionsError, match="smaller than chunk_size"):
        parse(["a.txt", "--chunk-size", "4", "--chunk-overlap", "4"])


def test_a_path_is_not_looked_at_while_parsing(tmp_path: Path) -> None:
    assert parsed(str(tmp_path / "none.csv")).input == str(tmp_path / "none.csv")
