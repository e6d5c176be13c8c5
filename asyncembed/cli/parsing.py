"""From arguments to a `Request`, with click; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from asyncembed.cli.exits import MEANINGS
from asyncembed.cli.options import GROUPS, PROGRAM, GroupedOption, job_fields, job_options, program_options
from asyncembed.cli.request import Request
from asyncembed.options import EmbedOptions

PROGRAM_NAME = "asyncembed"

DESCRIPTION = """\
Compute one embedding for every text of a file: a line of .txt, a row of .csv, a string of .json.

INPUT is a file, or - for standard input. The results go to a folder, one JSON file a text. A run that was stopped,
even killed, is continued by the same command; a second run computes only what is new.
"""

EXAMPLES = (
    ("asyncembed notes.csv", "the first column, into the folder data"),
    ("asyncembed reviews.csv --column text -o reviews", "a column by its name, into the folder reviews"),
    ("cut -f2 big.tsv | asyncembed - -o big", "one text a line from a pipe"),
    ("asyncembed big.txt --dry-run", "how long will it take, and will it fit?"),
    ("asyncembed notes.csv --json --quiet", "only the numbers, for a script"),
)


def parse(arguments: Sequence[str]) -> Request | int:
    """The request; or an exit code if nothing is left to do, as after `--help`.

    Raises:
        click.ClickException: The arguments cannot be understood.
        OptionsError: Two of them do not go together.
    """
    parsed: Request | int = command.main(list(arguments), prog_name=PROGRAM_NAME, standalone_mode=False)
    return parsed


class GroupedCommand(click.Command):
    """A command whose help groups the options and ends with examples and exit codes."""

    def __init__(
        self,
        *args: Any,
        groups: Sequence[str],
        examples: Sequence[tuple[str, str]],
        meanings: Sequence[tuple[str, str]],
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self._groups = groups
        self._examples = examples
        self._meanings = meanings

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section for each group."""
        for group in self._groups:
            rows = [
                row
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)  # the argument is explained above
                and getattr(param, "group", PROGRAM) == group
                and (row := param.get_help_record(ctx)) is not None
            ]
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows, col_max=32)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples and exit codes."""
        with formatter.section("Examples"):
            for line, meaning in self._examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
                formatter.write(f"{'':>{formatter.current_indent}}    {meaning}\n")
        with formatter.section("Exit codes"):
            formatter.write_dl(self._meanings)


def _request(input_argument: str | None, input_file: str | None, **values: Any) -> Request:
    """What click calls with the values of all parameters."""
    if input_argument is not None and input_file is not None:
        raise click.UsageError(f"two inputs are named, {input_argument!r} and {input_file!r}; a run takes one")
    source = input_argument if input_argument is not None else input_file
    if source is None:
        raise click.UsageError("no input is named; give a file, or - for standard input")
    options = EmbedOptions.from_kwargs(**job_fields(values))
    rest = {name: value for name, value in values.items() if name not in job_fields(values)}
    return Request(input=source, options=options, **rest)


def version_option(program: str) -> GroupedOption:
    """`--version`, which prints the program's name and the version of asyncembed."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if not value or ctx.resilient_parsing:
            return
        try:
            number = version("asyncembed")
        except PackageNotFoundError:  # run from a folder of sources
            number = "(not installed)"
        click.echo(f"{program} {number}")
        ctx.exit()

    return GroupedOption(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version.",
        group=PROGRAM,
    )


command = GroupedCommand(
    PROGRAM_NAME,
    callback=_request,
    help=DESCRIPTION,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Argument(["input_argument"], required=False, metavar="INPUT"),
        *program_options(),
        *job_options(),
        version_option(PROGRAM_NAME),
    ],
    groups=GROUPS,
    examples=EXAMPLES,
    meanings=MEANINGS,
)
"""The command; called, it returns a `Request`."""
