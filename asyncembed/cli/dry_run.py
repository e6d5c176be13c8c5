"""`--dry-run`: what a run would have to do, how long it would take and whether it fits; nothing is written."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asyncembed.cli.console import Console
from asyncembed.cli.options import Request
from asyncembed.cli.progress import in_words
from asyncembed.encoders import Encoder
from asyncembed.engine.chunking import Chunker
from asyncembed.engine.heap import ChunkHeap
from asyncembed.engine.limits import initial_limit
from asyncembed.engine.model_thread import ModelRunner
from asyncembed.engine.work import Client, Work
from asyncembed.errors import StoreError, StoreMismatchError
from asyncembed.job.loading import load_all
from asyncembed.options import EmbedOptions
from asyncembed.records import Chunk, EmbeddedChunk, EmbeddedText, FloatVector, SourceItem, Text, text_id
from asyncembed.sources import FileTexts
from asyncembed.store import DigestSet, StoredEmbeddings, open_embeddings
from asyncembed.store.codec import encode_json
from asyncembed.store.files import StorePaths, storage_errors
from asyncembed.store.json_files import JsonFiles, encode_record
from asyncembed.store.ledger import Header
from asyncembed.store.lock import check_ours
from asyncembed.store.origin import check_orphans
from asyncembed.wording import plural


@dataclass(slots=True)
class Plan:
    """What a run would have to do.

    Attributes:
        texts: Texts of the input.
        blank: Blank rows, which are passed over.
        bad_rows: Rows that could not be a text.
        repeats: Texts that repeat another of the input.
        cached: Texts that the folder holds already, repeats not counted.
        to_embed: Texts to compute.
        would_fail: Texts that cannot be embedded, as far as can be seen without the model.
        chunks, tokens: Of the texts to compute; tokens without special tokens and prompt.
        dropped_tokens: Tokens that `long_texts="truncate"` would cut off.
        unknown_tokens: Tokens that the model's vocabulary does not know.
        load_seconds: What loading the model took.
        seconds: Estimate for the texts to compute; None if nothing could be measured.
        tokens_per_second: The measured speed, in the same tokens.
        measured_tokens: Tokens it was measured on, special ones and prompt included.
        bytes, files: Estimate of what the results take of the file system; 0 if nothing is saved.
        free_bytes, free_files: What the file system has left; None where it does not say or nothing is saved.
        fits: Whether the results will fit.
        first_failure: Why the first of those that would fail would.
        refused: Why the folder would refuse this model or these options; None if it would not.
        model, device, backend, dtype, dim: What would compute, and the length of a vector.
        save_path: Where the results would be.
    """

    texts: int = 0
    blank: int = 0
    bad_rows: int = 0
    repeats: int = 0
    cached: int = 0
    to_embed: int = 0
    would_fail: int = 0
    chunks: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    unknown_tokens: int = 0
    load_seconds: float = 0.0
    seconds: float | None = None
    tokens_per_second: float | None = None
    measured_tokens: int = 0
    bytes: int = 0
    files: int = 0
    free_bytes: int | None = None
    free_files: int | None = None
    fits: bool = True
    refused: str | None = None
    model: str = ""
    device: str = ""
    backend: str = ""
    dtype: str = ""
    dim: int = 0
    save_path: str | None = None
    first_failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, as `--json` prints them."""
        return {"dry_run": True, **asdict(self)}

    def lines(self, source: str) -> Iterator[str]:
        """The numbers in words."""
        yield "Dry run: nothing was embedded or written."
        passed_over = [plural(self.repeats, "repeat")] * bool(self.repeats)
        passed_over += [plural(self.blank, "blank row")] * bool(self.blank)
        passed_over += [plural(self.bad_rows, "bad row")] * bool(self.bad_rows)
        yield _row("input", f"{source}: {plural(self.texts, 'text')}" + "".join(f", {part}" for part in passed_over))
        if self.save_path is not None:
            already = f"{self.cached:,} of them are" if self.cached else "nothing is"
            yield _row("saved", f"{already} in {self.save_path} so far")
        work = f"{plural(self.to_embed, 'text')}: {plural(self.chunks, 'chunk')}, {plural(self.tokens, 'token')}"
        yield _row("to embed", work)
        yield _row("model", f"{self.model}, {self.dim} dimensions, on {self.device} ({self.backend}, {self.dtype})")
        if self.to_embed:
            yield _row("time", self._time())
        if self.to_embed and self.free_bytes is not None:
            yield _row("disk", self._disk())

    def warnings(self) -> Iterator[str]:
        """What stands in the way of the run, or of its being complete."""
        if not self.fits:
            yield (
                f"the results will not fit: they need {in_bytes(self.bytes)} and {self.files:,} files; there is room "
                f"for {in_bytes(self.free_bytes or 0)}" + self._and_files() + ". Choose another save path"
            )
        if self.would_fail:
            yield f"{plural(self.would_fail, 'text')} would fail, the first because {self.first_failure}"
        if self.dropped_tokens:
            yield f"{plural(self.dropped_tokens, 'token')} of long texts would be cut off"

    def _time(self) -> str:
        loading = f"after {in_words(self.load_seconds)} of loading"
        if self.seconds is None:
            return f"unknown: the model failed on the sample ({loading})"
        speed = f"{self.tokens_per_second:,.0f} tokens/s, measured on {plural(self.measured_tokens, 'token')} here"
        return f"about {in_words(self.seconds)} {loading}: {speed}"

    def _disk(self) -> str:
        need = f"about {in_bytes(self.bytes)} in {plural(self.files, 'file')}"
        return f"{need}; free: {in_bytes(self.free_bytes or 0)}{self._and_files()}"

    def _and_files(self) -> str:
        return "" if self.free_files is None else f" and {plural(self.free_files, 'file')}"


def in_bytes(number: int) -> str:
    """An amount for a person: 512 bytes, 1.6 MB, 12 GB."""
    amount = float(number)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:,.0f} {unit}" if unit == "bytes" or amount >= 9.95 else f"{amount:.1f} {unit}"


def _row(name: str, words: str) -> str:
    return f"  {name:<9} {words}"


BESIDE_BYTES = 350
"""For each text beside its file: a row of the ledger, a line of the index, and its name in the folder."""

BESIDE_FILES = 8
"""The index, the ledger, the lock, their temporary files, the folders."""

_EMPTY: FloatVector = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Room:
    """What a file system has left.

    Attributes:
        path: The folder that was asked about, or the nearest one above it that exists.
        block_bytes: A file takes a multiple of this.
        free_bytes: Bytes that an ordinary user may still write.
        free_files: Files that may still be made; None where there is no such bound.
    """

    path: Path
    block_bytes: int
    free_bytes: int
    free_files: int | None

    @classmethod
    def at(cls, folder: Path) -> Room:
        """The room for a folder that need not exist yet.

        Raises:
            StoreError: A file is in the way, or the file system does not answer.
        """
        path = folder.absolute()
        while not path.exists() and path != path.parent:
            path = path.parent
        if not path.is_dir():
            raise StoreError(f"{path} is a file; choose another save path")
        with storage_errors(str(path)):
            if not hasattr(os, "statvfs"):
                return cls(path, 4096, shutil.disk_usage(path).free, None)
            found = os.statvfs(path)
        return cls(
            path, found.f_frsize or 4096, found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
        )

    def taken_by(self, n_bytes: int) -> int:
        """Bytes that a file of `n_bytes` takes, in whole blocks."""
        return -(-n_bytes // self.block_bytes) * self.block_bytes


def saved_in(folder: Path) -> StoredEmbeddings | None:
    """What is saved in a folder already; None if nothing is."""
    return open_embeddings(folder) if os.path.isdir(StorePaths.of(folder).data) else None


def vector_bytes(vectors: Sequence[FloatVector], dim: int) -> int:
    """Bytes of a vector of `dim` numbers as JSON, measured on `vectors`; guessed if there are none."""
    sizes = [len(encode_json(np.ascontiguousarray(vector[:dim], np.float32))) for vector in vectors]
    return round(sum(sizes) / len(sizes)) if sizes else 12 * dim


def file_bytes(text: str, chunks: Sequence[Chunk], n_vector_bytes: int) -> int:
    """Bytes of the file of a text, as it would be written with vectors of that many bytes."""
    pieces = tuple(EmbeddedChunk(chunk.text, chunk.start, chunk.n_tokens, _EMPTY) for chunk in chunks)
    n_tokens = sum(chunk.n_tokens for chunk in chunks)
    bare = len(encode_record(EmbeddedText(text_id(text), 0, None, text, _EMPTY, pieces, n_tokens), "0" * 16))
    n_vectors = 1 if len(chunks) == 1 else 1 + len(chunks)
    return bare + n_vectors * (n_vector_bytes - len("[]"))


_CLIENT = Client()

SAMPLE_CHUNKS = 512
MEASURE_S = 3.0


class Speed(NamedTuple):
    """A measurement.

    Attributes:
        n_tokens: Tokens that were embedded for it, special ones and prompt included.
        seconds: What that took.
    """

    n_tokens: int
    seconds: float

    def seconds_for(self, n_tokens: int) -> float | None:
        """What `n_tokens` would take; None if nothing could be measured."""
        return n_tokens * self.seconds / self.n_tokens if self.n_tokens else None


class Sample:
    """A fair sample of a stream of chunks: each has the same chance to be in it. The same stream gives the same one."""

    def __init__(self, size: int = SAMPLE_CHUNKS) -> None:
        self.chunks: list[Chunk] = []
        self._size = size
        self._n_seen = 0
        self._random = random.Random(0)

    def add(self, chunks: Iterable[Chunk]) -> None:
        """More of the stream."""
        for chunk in chunks:
            self._n_seen += 1
            if len(self.chunks) < self._size:
                self.chunks.append(chunk)
            elif (place := self._random.randrange(self._n_seen)) < self._size:
                self.chunks[place] = chunk


class Rehearsal:
    """Runs chunks in batches as a job would, and forgets the vectors."""

    def __init__(self, encoder: Encoder, options: EmbedOptions) -> None:
        self._runner = ModelRunner(encoder)
        self._limit = options.token_limit or initial_limit(encoder.device, encoder.slots)
        self._max_rows = options.batch_size

    def vectors(self, chunks: Sequence[Chunk]) -> list[FloatVector]:
        """The vectors of one batch at most; none if it fails. It also warms the model up."""
        heap = ChunkHeap()
        heap.push([Work(_CLIENT, "", chunks=tuple(chunks))])
        batch = heap.take(self._limit, self._max_rows)
        outcome = (self._runner.advance(batch) or self._runner.advance(None)) if batch is not None else None
        return [] if outcome is None or outcome.vectors is None else list(outcome.vectors)

    def measure(self, chunks: Sequence[Chunk]) -> Speed:
        """Embed the chunks, or as many as `MEASURE_S` seconds allow."""
        heap = ChunkHeap()
        heap.push([Work(_CLIENT, "", chunks=tuple(chunks))])
        n_tokens, started, now = 0, time.perf_counter(), time.perf_counter()
        while now - started < MEASURE_S:
            batch = heap.take(self._limit, self._max_rows)
            outcome = self._runner.advance(batch)
            if batch is None and outcome is None:
                break
            now = time.perf_counter()
            if outcome is not None and outcome.vectors is not None:
                n_tokens += outcome.batch.row_tokens
        while self._runner.advance(None) is not None:  # what is still under way was not counted
            pass
        return Speed(n_tokens, now - started)


GROUP_TEXTS = 256


def dry_run(request: Request, texts: FileTexts, console: Console) -> Plan:
    """Count the texts, and estimate what they would take; nothing is written.

    The model is loaded: only its tokenizer can count, and only running it tells how fast it is here.

    Returns:
        The numbers; `refused` in them says why the folder would refuse the run.

    Raises:
        SourceError: The input cannot be read.
        ModelError: The model cannot be loaded.
        StoreError: The folder cannot be used.
    """
    options = request.options
    folder = options.folder
    if folder is not None:
        check_ours(StorePaths.of(folder))
    room = Room.at(folder) if folder is not None else None
    saved = saved_in(folder) if folder is not None and not options.overwrite else None
    recorded = saved.fingerprint or {} if saved is not None else {}

    console.display.loading(f"the model {options.model}")
    started = time.perf_counter()
    encoder, chunker, fingerprint = load_all(options, None, recorded)
    plan = _plan_of(encoder, options.truncate_dim, time.perf_counter() - started)
    plan.save_path = str(folder) if folder is not None else None
    if folder is not None and saved is not None:
        plan.refused = _refusal(folder, saved, fingerprint)

    console.display.started(f"counting the tokens of {texts.name}")
    rehearsal = Rehearsal(encoder, options)
    count = _Count(plan, chunker, saved, room, rehearsal)
    for group in _groups(texts):
        count.add(group)
        if console.display.due():
            share = texts.bytes_read / texts.bytes_total if texts.bytes_total else None
            console.display.update(share, f"{plan.texts:,} texts, {plan.tokens:,} tokens")
    plan.blank, plan.bad_rows = texts.n_blank, texts.n_bad
    count.finish()
    console.display.close()

    if request.as_json:
        console.result(plan.as_dict())
    else:
        console.results(plan.lines(texts.name))
    for line in plan.warnings():
        console.warn(line)
    return plan


def _refusal(folder: Path, saved: StoredEmbeddings, fingerprint: Mapping[str, object]) -> str | None:
    """Why a run would be refused; None if it would not."""
    ours, paths = Header.of(fingerprint, {}), StorePaths.of(folder)
    try:
        if saved.fingerprint is not None:
            Header(saved.fingerprint, {}).compare(ours, paths.root)
        else:
            check_orphans(JsonFiles(paths), paths.root, ours)
    except StoreMismatchError as error:
        return str(error)
    return None


class _Count:
    """Adds up what a run would do, a group of texts at a time."""

    def __init__(
        self, plan: Plan, chunker: Chunker, saved: StoredEmbeddings | None, room: Room | None, rehearsal: Rehearsal
    ) -> None:
        self._plan = plan
        self._chunker = chunker
        self._saved = saved
        self._room = room
        self._rehearsal = rehearsal
        self._seen = DigestSet()
        self._sample = Sample()
        self._n_row_tokens = 0
        self._n_vector_bytes: int | None = None

    def add(self, group: list[SourceItem]) -> None:
        """Count the texts of a group."""
        plan = self._plan
        texts = [item.text for item in group if isinstance(item, Text)]
        plan.texts += len(texts)
        new = [text for text in self._first_seen(texts) if not self._is_saved(text)]
        works = [Work(_CLIENT, text) for text in new]
        self._chunker.chunk(works)
        for text, found in zip(new, works, strict=True):
            plan.unknown_tokens += found.unknown_tokens
            if found.error is not None:
                plan.would_fail += 1
                plan.first_failure = plan.first_failure or found.error
                continue
            plan.to_embed += 1
            plan.chunks += len(found.chunks)
            plan.tokens += found.n_tokens
            plan.dropped_tokens += found.dropped_tokens
            self._n_row_tokens += sum(chunk.length for chunk in found.chunks)
            self._sample.add(found.chunks)
            if self._room is not None:
                if self._n_vector_bytes is None:
                    self._n_vector_bytes = vector_bytes(self._rehearsal.vectors(found.chunks), plan.dim)
                plan.bytes += self._room.taken_by(file_bytes(text, found.chunks, self._n_vector_bytes)) + BESIDE_BYTES

    def finish(self) -> None:
        """All texts are counted: measure, and compare with the room there is."""
        plan, room = self._plan, self._room
        if plan.to_embed:
            speed = self._rehearsal.measure(self._sample.chunks)
            plan.seconds = speed.seconds_for(self._n_row_tokens)
            plan.measured_tokens = speed.n_tokens
            if plan.seconds:
                plan.tokens_per_second = round(plan.tokens / plan.seconds, 1)
                plan.seconds = round(plan.seconds, 3)
        if room is not None:
            plan.files = plan.to_embed + BESIDE_FILES * bool(plan.to_embed)
            plan.free_bytes, plan.free_files = room.free_bytes, room.free_files
            enough_files = room.free_files is None or plan.files <= room.free_files
            plan.fits = plan.bytes <= room.free_bytes and enough_files

    def _first_seen(self, texts: list[str]) -> list[str]:
        """Those that repeat none before them."""
        by_id = {text_id(text): text for text in texts}
        known = self._seen.contains_many(list(by_id))
        first = {
            identity: text for (identity, text), is_known in zip(by_id.items(), known, strict=True) if not is_known
        }
        self._seen.add_many(list(first))
        self._plan.repeats += len(texts) - len(first)
        return list(first.values())

    def _is_saved(self, text: str) -> bool:
        is_saved = self._saved is not None and text in self._saved
        self._plan.cached += is_saved
        return is_saved


def _plan_of(encoder: Encoder, truncate_dim: int | None, load_seconds: float) -> Plan:
    return Plan(
        model=encoder.name,
        device=encoder.device,
        backend=encoder.backend,
        dtype=encoder.dtype,
        dim=min(encoder.dim, truncate_dim or encoder.dim),
        load_seconds=round(load_seconds, 3),
    )


def _groups(texts: FileTexts) -> Iterator[list[SourceItem]]:
    iterator = (item for item in texts)  # islice asks for an iterator anew each time; the file gives one only once
    while group := list(islice(iterator, GROUP_TEXTS)):
        yield group
