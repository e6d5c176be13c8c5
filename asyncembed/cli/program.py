"""The program: arguments parsed, done, and turned into lines and an exit code whatever happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

from asyncembed.cli.console import MEANINGS, Console, Exit, writing_out
from asyncembed.cli.options import GROUPS, PROGRAM, GroupedOption, Request, job_fields, job_options, program_options
from asyncembed.cli.signals import Signals
from asyncembed.errors import OptionsError, StoreMismatchError
from asyncembed.options import FILE_OPTIONS, EmbedOptions

if TYPE_CHECKING:
    from asyncembed.store.files import StorePaths

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
    """The request; or an exit code if nothing is left to do, as after `--help`."""
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


def run_program(arguments: Sequence[str], signals: Signals) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    request: Request | int = Exit.DONE
    try:
        with writing_out():
            request = parse(arguments)
    except Exception as error:
        return Console(quiet=True).explain(error)
    if isinstance(request, int):
        return request
    with Console(quiet=request.quiet, verbose=request.verbose) as console:
        try:
            return _perform(request, console, signals)
        except Exception as error:
            code = console.explain(error)
            return signals.exit_code or code


def _perform(request: Request, console: Console, signals: Signals) -> int:
    # The input is opened before anything heavy is imported: a wrong name is told at once.
    from asyncembed.sources import read_texts
    from asyncembed.store.files import StorePaths

    options = request.options
    if options.folder is not None:
        _check_input(request.input, StorePaths.of(options.folder))
    if request.input == "-" and sys.stdin is not None and sys.stdin.isatty():
        console.say("reading texts from the terminal; Ctrl-D ends them")
    # Whoever reads the texts closes them. Not closed here: after a stop a thread may still wait in standard input, and
    # closing would wait with it.
    texts = read_texts(
        request.input,
        limit=request.limit,
        **{name: getattr(options, name) for name in FILE_OPTIONS},
    )
    if request.dry_run:
        from asyncembed.cli.dry_run import dry_run

        plan = dry_run(request, texts, console)
        if plan.refused is not None:
            raise StoreMismatchError(plan.refused)
        return Exit.DONE
    from asyncembed.cli.run import Run

    return Run(request, texts, console, signals).execute()


def _check_input(name: str, paths: StorePaths) -> None:
    """Refuse an input that the run would replace or remove."""
    if os.path.realpath(name) in map(os.path.realpath, (paths.errors, paths.index, paths.ledger)):
        raise OptionsError(
            f"{name} belongs to {paths.root}, and the run would replace it; copy it, or choose another folder"
        )
