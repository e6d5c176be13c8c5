"""The commands, with click; nothing that knows a model is imported, unless texts are to be computed again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

import click

from asyncembed.cli.console import Console, print_out
from asyncembed.cli.exits import Exit
from asyncembed.cli.streams import writing_out
from asyncembed.errors import AsyncEmbedError
from asyncembed.sinks.checking import FolderCheck
from asyncembed.sinks.folder import StorePaths
from asyncembed.sinks.reader import open_embeddings
from asyncembed.sinks.upkeep import are_all_known
from asyncembed.sinks.upkeep import failures as find_failures
from asyncembed.sinks.upkeep import rebuild as rebuild_index
from asyncembed.sinks.upkeep import remove_damaged as check_and_remove
from asyncembed.store_cli.recomputing import ModelChoice, Recomputation
from asyncembed.wording import plural

_FOLDER = click.argument("folder", metavar="DIR", type=click.Path())


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    with Console() as console:
        try:
            code: int = Exit.DONE
            with writing_out():
                code = group.main(list(arguments), prog_name="asyncembed-store", standalone_mode=False)
        except click.ClickException as error:
            with suppress(OSError):
                error.show()
            return error.exit_code
        except AsyncEmbedError as error:
            return console.explain(error)
        return code or Exit.DONE


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def group() -> None:
    """Look after a folder of embeddings. No model is loaded, but for verify --recompute.

    Exit codes: 0 all is well, 1 something is damaged, 2 bad usage, 3 the folder cannot be used (or a job writes to it).
    """


@group.command()
@_FOLDER
@click.option("--remove-damaged", is_flag=True, help="Remove damaged files, so that the next run makes them anew.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object a fault, and one with the numbers.")
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also compute N of the texts again, taken at random, and compare: loads the model.",
)
@click.option("--model", metavar="MODEL", help="For --recompute: the model, where it is not found as it was named.")
@click.option("--trust-remote-code", is_flag=True, help="For --recompute: let the model run code that it brings along.")
@click.option("--allow-pickle", is_flag=True, help="For --recompute: let weights be read from a pickle.")
def verify(
    folder: str, remove_damaged: bool, as_json: bool, recompute: int | None, model: str | None, **trust: bool
) -> int:
    """Read every file, and say what is wrong.

    A file is right if it is whole, its text is the one that its name says, its vector is finite and as long as the
    folder's, it was made with the folder's weights and options, and the index says the same of it.
    """
    if recompute is None and (model is not None or any(trust.values())):
        raise click.UsageError("--model, --trust-remote-code and --allow-pickle go with --recompute N")
    paths = _paths(folder)
    check = FolderCheck(paths)
    again = Recomputation(paths, recompute or 0, ModelChoice(model=model, **trust))
    faults = check.faults() if recompute is None else chain(check.faults(), again.faults())
    n_faults = n_removed = 0
    for fault in check_and_remove(paths, faults) if remove_damaged else faults:
        removed = remove_damaged and fault.removable
        n_faults, n_removed = n_faults + 1, n_removed + removed
        if as_json:
            print_out(json.dumps({"path": fault.path, "reason": fault.reason, "removed": removed}))
        else:
            print_out(f"{fault.path}: {fault.reason}{'; removed' if removed else ''}")
    numbers = {"files": check.n_files, "faults": n_faults, "removed": n_removed, "unlisted": check.n_unlisted}
    if recompute is not None:
        numbers["recomputed"] = again.n_texts
    if as_json:
        print_out(json.dumps(numbers))
    else:
        recomputed = f", {again.n_texts} computed again" if recompute is not None else ""
        unlisted = f"; {plural(check.n_unlisted, 'file')} not yet in the index" if check.n_unlisted else ""
        removal = f", {n_removed} removed: the next run makes them anew" if n_removed else ""
        print_out(f"{plural(check.n_files, 'file')} read{recomputed}, {plural(n_faults, 'fault')}{removal}{unlisted}")
    return Exit.INCOMPLETE if n_faults else Exit.DONE


@group.command()
@_FOLDER
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object a text.")
def failures(folder: str, as_json: bool) -> int:
    """List the texts that could not be embedded, and why. The next run tries them again.

    The texts themselves are in errors.jsonl, for the last run. Exits 1 if a damaged index may have named more.
    """
    paths = _paths(folder)
    n_failed = 0
    for failure in find_failures(paths):
        n_failed += 1
        if as_json:
            print_out(json.dumps({"id": failure.id, "reason": failure.reason, "keys": list(failure.keys)}))
        else:
            keys = f" ({', '.join(failure.keys)})" if failure.keys else ""
            print_out(f"{failure.id}{keys}: {failure.reason}")
    if not are_all_known(paths):
        told = f", of {plural(n_failed, 'text')} it is known" if n_failed else ""
        reason = f"is gone or cannot be read, so which texts failed is not known{told}; the next run tries them all"
        print_out(json.dumps({"path": paths.index, "reason": reason}) if as_json else f"{paths.index}: {reason}")
        return Exit.INCOMPLETE
    if not as_json:
        print_out(f"{plural(n_failed, 'text')} failed")
    return Exit.DONE


@group.command()
@_FOLDER
def rebuild(folder: str) -> int:
    """Make the index anew from the files.

    Keys and failures are kept as far as the old index and its journal can be read.
    """
    paths = _paths(folder)
    n_faults = 0
    for fault in rebuild_index(paths):
        n_faults += 1
        print_out(f"{fault.path}: {fault.reason}; left out")
    n_texts = len(open_embeddings(folder)) - n_faults
    print_out(f"{paths.index}: {plural(n_texts, 'text')}, {plural(n_faults, 'fault')}")
    return Exit.INCOMPLETE if n_faults else Exit.DONE


def _paths(folder: str) -> StorePaths:
    """The paths of a folder that is one of embeddings.

    Raises:
        StoreError: It is none.
    """
    open_embeddings(folder)
    return StorePaths.of(os.fspath(folder))
