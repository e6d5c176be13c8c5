"""Goes over the input as a run would, up to the model's door."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from asyncembed.chunking import Chunker
from asyncembed.cli.console import Console
from asyncembed.cli.dry_run.plan import Plan
from asyncembed.cli.dry_run.room import BESIDE_BYTES, BESIDE_FILES, Room, file_bytes, saved_in, vector_bytes
from asyncembed.cli.dry_run.speed import Rehearsal, Sample
from asyncembed.cli.request import Request
from asyncembed.encoders import Encoder
from asyncembed.errors import StoreMismatchError
from asyncembed.job.loading import load_all
from asyncembed.records import SourceItem, Text, text_id
from asyncembed.sinks import DigestSet, StoredEmbeddings
from asyncembed.sinks.folder import StorePaths
from asyncembed.sinks.header import Header
from asyncembed.sinks.origin import check_orphans, check_ours
from asyncembed.sources import FileTexts

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
            check_orphans(paths, ours, len(saved))
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
        for text, found in zip(new, self._chunker.chunk([(0, text, 0) for text in new]), strict=True):
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
