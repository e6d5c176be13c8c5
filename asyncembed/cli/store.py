"""`asyncembed-store`: looks after a folder of embeddings; no model is loaded, unless texts are to be computed again."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import click

from asyncembed.cli.console import Console, Exit, mend_streams, print_out, writing_out
from asyncembed.cli.signals import Signals
from asyncembed.errors import AsyncEmbedError, CorruptRecordError, StoreError
from asyncembed.store import StoredText, open_embeddings
from asyncembed.store.check import Fault, FolderCheck
from asyncembed.store.check import failures as find_failures
from asyncembed.store.check import rebuild as rebuild_index
from asyncembed.store.check import remove_damaged as check_and_remove
from asyncembed.store.files import StorePaths, storage_errors
from asyncembed.store.formats import format_of
from asyncembed.store.ledger import Header
from asyncembed.wording import plural


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The model that computes, where it is not the one that the folder names, and what it may load."""

    model: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class Recomputation:
    """Computes texts of a folder again, by torch, so that it needs no graph.

    Attributes:
        n_texts: Texts computed so far.
    """

    def __init__(self, paths: StorePaths, n_wanted: int, choice: ModelChoice) -> None:
        self.n_texts = 0
        self._paths = paths
        self._n_wanted = n_wanted
        self._choice = choice

    def __repr__(self) -> str:
        return f"<Recomputation {self._paths.root!r} n_texts={self.n_texts}>"

    def faults(self) -> Iterator[Fault]:
        """The files of the sample whose vectors are not what the model gives."""
        from asyncembed.encoders import Instruction, load_encoder
        from asyncembed.job.loading import load_chunker, run_fingerprint
        from asyncembed.job.lookup import MIN_COSINE, MIN_COSINE_ROUGH, disagreements
        from asyncembed.options import EmbedOptions

        stored = open_embeddings(self._paths.root)
        made, made_with = stored.fingerprint, stored.made_with
        model = self._choice.model or (made_with or {}).get("model")
        if made is None or model is None:
            raise StoreError(f"{self._paths.root}: nothing says what its texts were made with; run a job first")
        options = EmbedOptions(
            model=model,
            backend="openvino" if made.get("dtype") == "int8" else "torch",
            trust_remote_code=self._choice.trust_remote_code,
            allow_pickle=self._choice.allow_pickle,
            prompt=made.get("prompt"),
            task=made.get("task"),
            normalize_embeddings=made.get("normalize_embeddings", False),
        )
        encoder = load_encoder(options, recorded=made)
        options = replace(options, truncate_dim=min(encoder.dim, made.get("dim", encoder.dim)))
        chunker = load_chunker(encoder, options)
        ours = run_fingerprint(encoder, chunker, options)
        # How a text was cut into chunks is in its file.
        ours |= {name: made[name] for name in ("chunk_size", "chunk_overlap", "long_texts", "splitter") if name in made}
        Header.of(made, {}).compare(Header.of(ours, {}), self._paths.root)
        least = MIN_COSINE if encoder.dtype == "float32" else MIN_COSINE_ROUGH
        header = Header.of(made, {})
        ours_alone = (text for text in self._sample() if header.covers(text))  # of others all is said
        for wrong, cosine in disagreements(encoder, Instruction(chunker.prompt, chunker.task), ours_alone, least):
            yield Fault(
                self._paths.record(wrong.id), f"its vector is not what the model gives (cosine {cosine:.4f})", True
            )

    def _sample(self) -> Iterator[StoredText]:
        """So many stored texts, each with the same chance; damaged ones are passed over."""
        texts, chosen = format_of(self._paths), list[str]()
        with storage_errors(self._paths.root):
            for number, identity in enumerate(name for block in texts.ids() for name in block):
                if len(chosen) < self._n_wanted:
                    chosen.append(identity)
                elif (place := random.randrange(number + 1)) < self._n_wanted:
                    chosen[place] = identity
        for identity in chosen:
            try:
                stored = texts.read(identity)
            except (CorruptRecordError, FileNotFoundError):
                continue
            self.n_texts += 1
            yield stored


_FOLDER = click.argument("folder", metavar="DIR", type=click.Path())


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say.

    Returns:
        The exit code.
    """
    with Console(program="asyncembed-store") as console:
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
    folder's, it was made with the folder's weights and options, and the ledger says the same of it.
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
        unlisted = f"; {plural(check.n_unlisted, 'file')} not yet in the ledger" if check.n_unlisted else ""
        removal = f", {n_removed} removed: the next run makes them anew" if n_removed else ""
        print_out(f"{plural(check.n_files, 'file')} read{recomputed}, {plural(n_faults, 'fault')}{removal}{unlisted}")
    return Exit.INCOMPLETE if n_faults else Exit.DONE


@group.command()
@_FOLDER
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object a text.")
def failures(folder: str, as_json: bool) -> int:
    """List the texts that could not be embedded, and why. The next run tries them again.

    The texts themselves are in errors.jsonl, for the last run. Exits 1 if a damaged ledger may have named more.
    """
    paths = _paths(folder)
    failed, is_all = find_failures(paths)
    for failure in failed:
        if as_json:
            print_out(json.dumps({"id": failure.id, "reason": failure.reason, "keys": list(failure.keys)}))
        else:
            keys = f" ({', '.join(failure.keys)})" if failure.keys else ""
            print_out(f"{failure.id}{keys}: {failure.reason}")
    if not is_all:
        told = f", of {plural(len(failed), 'text')} it is known" if failed else ""
        reason = f"is gone or cannot be read, so which texts failed is not known{told}; the next run tries them all"
        print_out(json.dumps({"path": paths.ledger, "reason": reason}) if as_json else f"{paths.ledger}: {reason}")
        return Exit.INCOMPLETE
    if not as_json:
        print_out(f"{plural(len(failed), 'text')} failed")
    return Exit.DONE


@group.command()
@_FOLDER
def rebuild(folder: str) -> int:
    """Make ledger and index anew from the files.

    Keys and failures are kept as far as the old ones can be read.
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
    """The paths of a folder that is one of embeddings."""
    open_embeddings(folder)
    return StorePaths.of(os.fspath(folder))


def main() -> None:
    """Runs the program with the arguments of this process; ends in `SystemExit` with the exit code."""
    Signals().install()  # Ctrl-C and SIGTERM end it in one line: nothing it does can be left half done
    mend_streams()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
