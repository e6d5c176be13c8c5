"""The program: its options, its life, and how whatever happens becomes lines and an exit code."""

from __future__ import annotations

import logging
import math
import os
import re
import string
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import click

from asyncembed.cli.console import Exit, exit_code_of, known_error, writing_out
from asyncembed.cli.options import GROUPS, MODEL, TEXTS, GroupedOption, job_options
from asyncembed.cli.program import GroupedCommand, version_option
from asyncembed.cli.signals import Signals
from asyncembed.errors import OptionsError
from asyncembed.options import parse_bytes
from asyncembed.server.settings import DEFAULT_BODY_BYTES, DEFAULT_DRAIN_S, DEFAULT_INPUTS, ServerSettings

PROGRAM_NAME = "asyncembed-server"

DESCRIPTION = """\
Serve a model over HTTP the way OpenAI serves embeddings: POST /v1/embeddings.

Requests of all clients share batches. Every option has a default that works; open the address in a browser for help.
"""

EXAMPLES = (
    ("asyncembed-server", "all-MiniLM-L6-v2 at http://127.0.0.1:8000"),
    ("asyncembed-server --model ./my-model --port 9000", "a model of your own"),
    ("ASYNCEMBED_API_KEY=secret asyncembed-server --host 0.0.0.0", "for other machines, with a key"),
    ("asyncembed-server --alias text-embedding-3-small", "for clients that ask for a name they know"),
)

MEANINGS = (
    ("0", "ended by Ctrl-C or SIGTERM; requests under way were answered"),
    ("2", "bad usage, or the extra asyncembed[server] is not installed"),
    ("3", "cannot go on: the port is taken, the model cannot be loaded, its device failed"),
    ("130", "left at once at a second Ctrl-C; 143 at a second SIGTERM"),
)

SERVER = "Server"
LIMITS = "Limits"

KEY_VARIABLE = "ASYNCEMBED_API_KEY"

TAKEN = (
    "model",
    "device",
    "backend",
    "dtype",
    "trust_remote_code",
    "allow_pickle",
    "long_texts",
    "chunk_size",
    "chunk_overlap",
    "prompt",
    "prompt_name",
    "task",
    "normalize_embeddings",
    "truncate_dim",
    "batch_size",
    "token_limit",
)
"""The options of a job that are options of the server as well."""


def _amount(ctx: click.Context, param: click.Parameter, value: str | int) -> int:
    """Bytes; 0 may be written."""
    try:
        return 0 if value in (0, "0") else parse_bytes(value)
    except OptionsError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _origins(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers send them: in small letters, without a slash at the end."""
    for value in values:
        if value != "*" and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+/?", value):
            message = f"{value!r} is no origin: scheme, host and port, such as https://app.example.org:8443, or *"
            raise click.BadParameter(message, ctx, param)
    return tuple(value.rstrip("/").lower() for value in values)


def _seconds(_: click.Context, __: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds")
    return value


def _prefix(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """With a slash before it and none behind."""
    if re.search(r"[?#]|://", value):
        raise click.BadParameter(f"{value!r} is no path; give what comes behind the host, such as /embed", ctx, param)
    return f"/{value.strip('/')}" if value.strip("/") else ""


def parse(arguments: Sequence[str]) -> ServerSettings | int:
    """The settings; or an exit code if nothing is left to do, as after `--help`."""
    parsed: ServerSettings | int = command.main(list(arguments), prog_name=PROGRAM_NAME, standalone_mode=False)
    return parsed


def _settings(**values: Any) -> ServerSettings:
    """What click calls with the values of all parameters."""
    api_key = values.pop("api_key")
    if api_key is None:  # click takes a variable that is set and empty for one that is not set
        api_key = os.environ.get(KEY_VARIABLE)
    if api_key is not None and not (api_key := api_key.strip(string.whitespace)):  # as the client's is
        raise click.UsageError(f"the API key is empty; without --api-key and {KEY_VARIABLE} everyone is let in")
    options = {name: values.pop(name) for name in TAKEN if name != "model"}
    options["max_pending_bytes"] = values.pop("max_pending_bytes") or None
    options |= {name: values.pop(name) for name in ("cache_bytes", "query_prompt", "document_prompt")}
    return ServerSettings(options=options, api_key=api_key, **values)


def _model_options() -> list[click.Parameter]:
    found = [option for option in job_options() if option.name in TAKEN]
    for option in found:
        if option.name == "dtype" and isinstance(option, click.Option):
            option.help = "Precision; auto is float32 on a CPU, else as the weights are stored."
    return found


def _server_options() -> list[click.Parameter]:
    return [
        GroupedOption(["--host"], default="127.0.0.1", metavar="ADDRESS", show_default=True, group=SERVER,
                      help="Address to listen on; 0.0.0.0 for all of this machine's."),
        GroupedOption(["--port"], type=click.IntRange(0, 65535), default=8000, show_default=True, group=SERVER,
                      help="Port to listen on; 0 takes a free one and prints it."),
        GroupedOption(["--api-key"], envvar=KEY_VARIABLE, metavar="KEY", group=SERVER,
                      help="Clients must send it as bearer token. Better set ASYNCEMBED_API_KEY: others can see the "
                      "arguments of a process."),
        GroupedOption(["--cors-origin", "cors_origins"], multiple=True, callback=_origins, metavar="ORIGIN",
                      group=SERVER, help="Let pages of this origin, such as https://app.example.org, ask from a "
                      "browser; may be repeated; * is any."),
        GroupedOption(["--root-path"], default="", callback=_prefix, metavar="PATH", group=SERVER,
                      help="The prefix under which a proxy serves this, such as /embed; whether the proxy takes it off "
                      "or not."),
        GroupedOption(["--drain-s"], type=click.FloatRange(min=0), callback=_seconds, default=DEFAULT_DRAIN_S,
                      metavar="SECONDS", show_default=True, group=SERVER,
                      help="How long requests under way may take after SIGTERM."),
        GroupedOption(["--alias", "aliases"], multiple=True, metavar="NAME", group=MODEL,
                      help="A further name that clients may use for the model; may be repeated."),
        GroupedOption(["--accept-token-ids"], is_flag=True, group=MODEL,
                      help="Take token ids in the place of texts, for clients that have this model's own tokenizer. "
                      "Ids of another one, as LangChain's OpenAIEmbeddings sends by default, give wrong vectors."),
        GroupedOption(["--query-prompt"], metavar="TEXT", group=TEXTS,
                      help="Put before queries (input_type), for models that do not say it themselves."),
        GroupedOption(["--document-prompt"], metavar="TEXT", group=TEXTS, help="The same for documents."),
        GroupedOption(["--max-body-bytes"], type=click.UNPROCESSED, callback=_amount, metavar="SIZE",
                      default=DEFAULT_BODY_BYTES, show_default="16MiB", group=LIMITS, help="Most bytes of a request."),
        GroupedOption(["--max-inputs"], type=click.IntRange(min=1), default=DEFAULT_INPUTS, metavar="N",
                      show_default=True, group=LIMITS, help="Most texts of a request."),
        GroupedOption(["--max-pending-bytes"], type=click.UNPROCESSED, callback=_amount, default=0, metavar="SIZE",
                      show_default="a quarter of what is free, at most 256MiB", group=LIMITS,
                      help="Memory for texts under way; half of it is for these requests. What finds no room is told "
                      "to come again: 429."),
        GroupedOption(["--cache-bytes"], type=click.UNPROCESSED, callback=_amount, default=0, metavar="SIZE",
                      show_default="no cache", group=LIMITS,
                      help="Memory for the vectors used last, so that repeated texts cost nothing."),
    ]  # fmt: skip


command = GroupedCommand(
    PROGRAM_NAME,
    callback=_settings,
    help=DESCRIPTION,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[*_server_options(), *_model_options(), version_option(PROGRAM_NAME)],
    groups=(SERVER, LIMITS, *GROUPS),
    examples=EXAMPLES,
    meanings=MEANINGS,
)
"""The command; called, it returns `ServerSettings`."""


NEEDED = ("starlette", "uvicorn", "prometheus_client")
"""What the extra `server` brings."""


def run_program(arguments: Sequence[str], signals: Signals) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    try:
        settings: ServerSettings | int = Exit.DONE
        with writing_out():
            settings = parse(arguments)
        if isinstance(settings, int):
            return settings
        missing = [name for name in NEEDED if not _is_installed(name)]
        if missing:
            say(f"error: {' and '.join(missing)} not installed; pip install 'asyncembed[server]' brings what is needed")
            return Exit.USAGE
        logging.basicConfig(format=f"{PROGRAM_NAME}: %(levelname)s: %(message)s", level=logging.WARNING)
        from asyncembed.server.serving import serve

        return serve(settings, signals, say)
    except Exception as error:
        if known_error(error) is None:
            raise
        say(f"error: {_words(error)}")
        return exit_code_of(error)


def say(line: str) -> None:
    """A line on standard error, if that takes it."""
    with suppress(OSError):
        click.echo(f"{PROGRAM_NAME}: {line}", err=True)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # imported before, and made unusable
        return False


def _words(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return f"{error.format_message()} ({PROGRAM_NAME} --help shows the options)"
    return " ".join(str(known_error(error)).split("\n"))
