"""`--dry-run`: what a run would have to do, how long it would take and whether it fits; nothing is written."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from asyncembed.cli.console import Console, in_words
from asyncembed.cli.options import Request
from asyncembed.encoders import Encoder
from asyncembed.encoders.base import pads_rows
from asyncembed.engine.chunking import Chunker
from asyncembed.engine.engine import ModelRunner
from asyncembed.engine.heap import ChunkHeap
from asyncembed.engine.limits import initial_limit
from asyncembed.engine.work import Client, Work
from asyncembed.errors import StoreError, StoreMismatchError
from asyncembed.job.loading import load_all
from asyncembed.options import EmbedOptions
from asyncembed.records import Chunk, FloatVector, SourceItem, Text, text_id
from asyncembed.sources import FileTexts
from asyncembed.store import DigestSet, StoredEmbeddings, open_embeddings
from asyncembed.store.files import StorePaths, encode_json, storage_errors
from asyncembed.store.formats import format_of
from asyncembed.store.ledger import Header
from asyncembed.store.lock import check_ours
from asyncembed.store.writer import check_orphans
from asyncembed.wording import plural

GROUP_TEXTS = 256
SAMPLE_CHUNKS = 512
MEASURE_S = 3.0

BLOCK_BYTES = 4096
"""A file takes whole blocks of most file systems: half of one is lost on average."""

RECORD_BYTES = 200
"""What a text's file holds beside text and vectors."""

BESIDE_BYTES = 350
"""For each text beside its file: a row of the ledger, a line of the index, and its name in the folder."""

BESIDE_FILES = 8
"""The index, the ledger, the lock, their temporary files, the folders."""

_CLIENT = Client()


@dataclass(slots=True)
class Plan:
    """What a run would have to do, as `--json` prints it: counts, estimates, and None for what is not known."""

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


def free_space(folder: Path) -> tuple[int, int | None]:
    """Bytes and files that may still be written where a folder is, or will be; no number of files where none is set."""
    path = folder.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir():
        raise StoreError(f"{path} is a file; choose another save path")
    with storage_errors(str(path)):
        files = os.statvfs(path) if hasattr(os, "statvfs") else None
        return shutil.disk_usage(path).free, files.f_favail if files is not None and files.f_files else None


def dry_run(request: Request, texts: FileTexts, console: Console) -> Plan:
    """Count the texts, and estimate what they would take; nothing is written.

    The model is loaded: only its tokenizer can count, and only running it tells how fast it is here. `refused` in the
    numbers says why the folder would refuse the run.
    """
    options = request.options
    folder, saved = options.folder, None
    plan = Plan(save_path=str(folder) if folder is not None else None)
    if folder is not None:
        check_ours(StorePaths.of(folder))
        plan.free_bytes, plan.free_files = free_space(folder)
        if not options.overwrite and os.path.isdir(StorePaths.of(folder).data):
            saved = open_embeddings(folder)

    console.display.loading(f"the model {options.model}")
    started = time.perf_counter()
    encoder, chunker, fingerprint = load_all(options, None, (saved.fingerprint or {}) if saved is not None else {})
    plan.load_seconds = round(time.perf_counter() - started, 3)
    plan.model, plan.device, plan.backend, plan.dtype = encoder.name, encoder.device, encoder.backend, encoder.dtype
    plan.dim = min(encoder.dim, options.truncate_dim or encoder.dim)
    if saved is not None:
        plan.refused = _refusal(StorePaths.of(saved.path), saved, fingerprint)

    console.display.started(f"counting the tokens of {texts.name}")
    count = _Count(plan, chunker, saved)
    iterator = (item for item in texts)  # islice asks for an iterator anew each time; the file gives one only once
    while group := list(islice(iterator, GROUP_TEXTS)):
        count.add(group)
        if console.display.due():
            share = texts.bytes_read / texts.bytes_total if texts.bytes_total else None
            console.display.update(share, f"{plan.texts:,} texts, {plan.tokens:,} tokens")
    plan.blank, plan.bad_rows = texts.n_blank, texts.n_bad
    if plan.to_embed:
        count.measure(encoder, options)
    console.display.close()

    if request.as_json:
        console.result(plan.as_dict())
    else:
        console.results(plan.lines(texts.name))
    for line in plan.warnings():
        console.warn(line)
    return plan


def _refusal(paths: StorePaths, saved: StoredEmbeddings, fingerprint: Mapping[str, object]) -> str | None:
    """Why a run would be refused; None if it would not."""
    ours = Header.of(fingerprint, {})
    try:
        if saved.fingerprint is not None:
            Header(saved.fingerprint, {}).compare(ours, paths.root)
        else:
            check_orphans(format_of(paths), paths.root, ours)
    except StoreMismatchError as error:
        return str(error)
    return None


class _Count:
    """Adds up what a run would do, a group of texts at a time."""

    def __init__(self, plan: Plan, chunker: Chunker, saved: StoredEmbeddings | None) -> None:
        self._plan = plan
        self._chunker = chunker
        self._saved = saved
        self._seen = DigestSet()
        self._sample: list[Chunk] = []  # each chunk has the same chance to be in it
        self._random = random.Random(0)
        self._n_row_tokens = self._n_text_bytes = self._n_vectors = 0

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
            plan.tokens += found.n_tokens
            plan.dropped_tokens += found.dropped_tokens
            n_chunks = len(found.chunks)
            self._n_text_bytes += len(text.encode("utf-8", "surrogatepass")) * (1 if n_chunks == 1 else 2)
            self._n_vectors += 1 if n_chunks == 1 else 1 + n_chunks
            for chunk in found.chunks:
                self._add_to_sample(chunk)

    def measure(self, encoder: Encoder, options: EmbedOptions) -> None:
        """All texts are counted: how long they would take, what their results, and whether these fit."""
        plan = self._plan
        n_tokens, seconds, vector = _measure(encoder, options, self._sample)
        plan.measured_tokens = n_tokens
        if n_tokens:
            plan.seconds = round(self._n_row_tokens * seconds / n_tokens, 3)
            plan.tokens_per_second = round(plan.tokens / plan.seconds, 1) if plan.seconds else None
        if plan.save_path is None:
            return
        shown = encode_json(np.ascontiguousarray(vector[: plan.dim], np.float32)) if vector is not None else b""
        n_vector_bytes = len(shown) or 12 * plan.dim
        per_text = RECORD_BYTES + BLOCK_BYTES // 2 + BESIDE_BYTES
        plan.bytes = self._n_text_bytes + self._n_vectors * n_vector_bytes + plan.to_embed * per_text
        plan.files = plan.to_embed + BESIDE_FILES
        enough_files = plan.free_files is None or plan.files <= plan.free_files
        plan.fits = plan.bytes <= (plan.free_bytes or 0) and enough_files

    def _add_to_sample(self, chunk: Chunk) -> None:
        self._plan.chunks += 1
        self._n_row_tokens += chunk.length
        if len(self._sample) < SAMPLE_CHUNKS:
            self._sample.append(chunk)
        elif (place := self._random.randrange(self._plan.chunks)) < SAMPLE_CHUNKS:
            self._sample[place] = chunk

    def _first_seen(self, texts: list[str]) -> list[str]:
        """Those that repeat none before them."""
        by_id = {text_id(text): text for text in texts}
        known = self._seen.contains_many(list(by_id))
        first = {name: text for (name, text), is_known in zip(by_id.items(), known, strict=True) if not is_known}
        self._seen.add_many(list(first))
        self._plan.repeats += len(texts) - len(first)
        return list(first.values())

    def _is_saved(self, text: str) -> bool:
        is_saved = self._saved is not None and text in self._saved
        self._plan.cached += is_saved
        return is_saved


def _measure(encoder: Encoder, options: EmbedOptions, chunks: Sequence[Chunk]) -> tuple[int, float, FloatVector | None]:
    """Embed chunks in batches as a job would, for some seconds: tokens (with special ones), seconds, and a vector.

    The first batch only warms the model up, unless it is the only one.
    """
    runner, heap = ModelRunner(encoder), ChunkHeap()
    pads = pads_rows(encoder)
    limit = options.token_limit or initial_limit(encoder.device, encoder.slots, pads=pads)
    heap.push([Work(_CLIENT, "", chunks=tuple(chunks))])
    warm_up = heap.take(limit, options.batch_size, pads=pads)
    outcome = runner.advance(warm_up) or runner.advance(None)
    vector = outcome.vectors[0] if outcome is not None and outcome.vectors is not None else None
    heap.clear()
    heap.push([Work(_CLIENT, "", chunks=tuple(chunks))])
    n_tokens, started, now = 0, time.perf_counter(), time.perf_counter()
    while now - started < MEASURE_S:
        batch = heap.take(limit, options.batch_size, pads=pads)
        outcome = runner.advance(batch)
        if batch is None and outcome is None:
            break
        now = time.perf_counter()
        if outcome is not None and outcome.vectors is not None:
            n_tokens += outcome.batch.row_tokens
    while runner.advance(None) is not None:  # what is still under way was not counted
        pass
    return n_tokens, now - started, vector
