"""The options of the command line, made from the fields of `EmbedOptions`: types, choices and defaults are theirs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import click

from asyncembed.errors import OptionsError
from asyncembed.options import EmbedOptions, parse_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A command line, parsed.

    Attributes:
        input: A path, or `-` for standard input.
        options: The options of the job.
        limit: Stop after so many texts; None for no bound.
        dry_run: Count and estimate only.
        as_json: One JSON object on standard output instead of words.
        quiet: Neither progress nor summary.
        verbose: More messages, and tracebacks.
    """

    input: str
    options: EmbedOptions
    limit: int | None = None
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def texts_in_python(self) -> str | None:
        """The call that reads the same texts in Python; None for what is gone: standard input, another pipe."""
        from asyncembed.sources import read_texts

        if not os.path.isfile(self.input):
            return None
        taken = signature(read_texts).parameters
        defaults = {field.name: field.default for field in fields(EmbedOptions)}
        chosen = {name: getattr(self.options, name) for name in defaults if name in taken}
        arguments = [f"{name}={value!r}" for name, value in chosen.items() if value != defaults[name]]
        arguments += [f"limit={self.limit}"] if self.limit is not None else []
        return f"read_texts({', '.join([repr(self.input), *arguments])})"


INPUT = "Input"
OUTPUT = "Output"
MODEL = "Model"
TEXTS = "Texts and vectors"
MEMORY = "Speed and memory"
PROGRAM = "Program"
GROUPS = (INPUT, OUTPUT, MODEL, TEXTS, MEMORY, PROGRAM)
"""The groups of options, in the order of the help."""

PROGRAMMATIC = frozenset({"ordered"})
"""Fields without an option: the order in which a program is given its results."""


class GroupedOption(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class _Entry(NamedTuple):
    """How a field appears on the command line.

    Attributes:
        group: The heading it stands under.
        help: What it does.
        names: Names beside the field's own, or, if `own_name` is false, instead of it.
        metavar: Stands for the value in the help.
        otherwise: What happens without it, where the default is None.
        own_name: Whether the field's name with dashes is an option.
    """

    group: str
    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    otherwise: str | None = None
    own_name: bool = True


ENTRIES: dict[str, _Entry] = {
    "input_format": _Entry(INPUT, "Format of the input; auto goes by the extension, and is txt for standard input."),
    "column": _Entry(INPUT, "CSV: the column of the texts, by its name in the first row.", metavar="NAME"),
    "header": _Entry(INPUT, "CSV: the first row holds names and is no text."),
    "delimiter": _Entry(
        INPUT,
        "CSV: what stands between cells: one character, or tab.",
        metavar="CHARACTER",
        otherwise="a comma, or what Excel's line sep= names",
    ),
    "escape": _Entry(INPUT, "CSV: what makes the next character an ordinary one, such as '\\'.", metavar="CHARACTER"),
    "encoding": _Entry(INPUT, "Encoding of the input, such as utf-16 or cp1252.", metavar="NAME", otherwise="UTF-8"),
    "on_bad_row": _Entry(INPUT, "A row that cannot be a text: stop there, or skip it and note it in errors.jsonl."),
    "save_path": _Entry(
        OUTPUT,
        "Folder of the results, one JSON file a text. Texts it holds are not computed again.",
        ("-o",),
        "FOLDER",
    ),
    "overwrite": _Entry(OUTPUT, "Remove the folder's earlier results first."),
    "durability": _Entry(
        OUTPUT, "What a saved text outlives: a killed process, or also a power cut (slower: every file is flushed)."
    ),
    "on_error": _Entry(OUTPUT, "A text that cannot be embedded: note it in errors.jsonl and go on, or end the run."),
    "model": _Entry(
        MODEL,
        "A model's name or its folder. The default is installed with asyncembed and needs no network.",
        ("-m", "--model-path", "--model"),
        "MODEL",
        own_name=False,
    ),
    "device": _Entry(
        MODEL, "auto takes a GPU if there is one; or cpu, cuda, cuda:1, mps, and so on.", ("-d",), "DEVICE"
    ),
    "backend": _Entry(
        MODEL, "What runs the model. OpenVINO's graphs are kept in asyncembed/graphs of your cache folder."
    ),
    "dtype": _Entry(
        MODEL,
        "Precision; auto is float32 on a CPU, or what the folder was made with. bfloat16 and int8 are faster there.",
    ),
    "trust_remote_code": _Entry(MODEL, "Let a model run code that it brings along."),
    "allow_pickle": _Entry(MODEL, "Let weights be read from a pickle where there are no safetensors."),
    "long_texts": _Entry(
        TEXTS, "A text longer than the model takes: average its chunks, truncate it, or count it as an error."
    ),
    "chunk_size": _Entry(TEXTS, "Most tokens of a chunk.", metavar="TOKENS", otherwise="what the model takes"),
    "chunk_overlap": _Entry(TEXTS, "Tokens that neighbouring chunks of a text share.", metavar="TOKENS"),
    "prompt": _Entry(TEXTS, "Put before every chunk.", metavar="TEXT"),
    "prompt_name": _Entry(TEXTS, "Name of one of the model's own prompts.", metavar="NAME"),
    "task": _Entry(
        TEXTS, "Which of its routes or adapters a model that has several takes: query, document, ….", metavar="NAME"
    ),
    "normalize_embeddings": _Entry(TEXTS, "Scale every vector to length 1."),
    "truncate_dim": _Entry(TEXTS, "Keep only the first dimensions of a vector.", metavar="N"),
    "max_memory_usage": _Entry(
        MEMORY,
        "Memory for texts in flight, such as 2GB or 512MiB.",
        metavar="SIZE",
        otherwise="a quarter of what is free, at most 2 GB",
    ),
    "batch_size": _Entry(MEMORY, "Most chunks in a batch.", metavar="N", otherwise="as the token limit allows"),
    "token_limit": _Entry(
        MEMORY, "First limit of a batch in tokens with padding.", metavar="TOKENS", otherwise="found by trying"
    ),
}
"""Every field of `EmbedOptions` but the programmatic ones, in the order of the help."""


def job_options() -> list[click.Parameter]:
    """An option for every field of `EmbedOptions` that has an entry."""
    defaults = {field.name: field.default for field in fields(EmbedOptions)}
    types = get_type_hints(EmbedOptions)
    return [_option(name, entry, types[name], defaults[name]) for name, entry in ENTRIES.items()]


def program_options() -> list[click.Parameter]:
    """The options that are no matter of the job."""
    return [
        GroupedOption(
            ["input_file", "-i", "--input-file"], metavar="INPUT", help="The input, instead of naming it alone.",
            group=INPUT,
        ),
        GroupedOption(
            ["--limit"], type=click.IntRange(min=1), metavar="N", help="Take only the first N texts.", group=INPUT
        ),
        GroupedOption(
            ["--dry-run"],
            is_flag=True,
            help="Write nothing: count texts and tokens, and estimate time and disk space.",
            group=PROGRAM,
        ),
        GroupedOption(
            ["as_json", "--json"],
            is_flag=True,
            help="Print the numbers as one JSON object on standard output.",
            group=PROGRAM,
        ),
        GroupedOption(
            ["-q", "--quiet"], is_flag=True, help="No progress and no summary; warnings and errors only.", group=PROGRAM
        ),
        GroupedOption(
            ["-v", "--verbose"], is_flag=True, help="More messages, and the traceback of an error.", group=PROGRAM
        ),
    ]  # fmt: skip


def job_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Of parsed values, those that are fields of `EmbedOptions`."""
    return {name: value for name, value in values.items() if name in ENTRIES}


def _option(name: str, entry: _Entry, kind: Any, default: Any) -> GroupedOption:
    own = (f"--{name.replace('_', '-')}",) if entry.own_name else ()
    attributes: dict[str, Any] = {"help": entry.help, "group": entry.group, "metavar": entry.metavar}
    members: Sequence[Any] = get_args(kind) or (kind,)
    if kind is bool:
        attributes["is_flag"] = True
    elif get_origin(kind) is Literal:
        attributes["type"] = click.Choice(members)
    elif name == "max_memory_usage":
        attributes["callback"] = _check_amount
    elif int in members:
        attributes["type"] = click.IntRange(min=0 if default == 0 else 1)
    else:
        attributes["type"] = str
    return GroupedOption(
        [name, *entry.names, *own],
        default=default,
        show_default=entry.otherwise or (kind is not bool and default is not None),
        **attributes,
    )


def _check_amount(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An amount of memory, kept as it was written."""
    try:
        if value is not None:
            parse_bytes(value)
    except OptionsError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    return value
