"""The parts of the dry run that need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asyncembed.cli.dry_run import Plan, Room, Sample, Speed, file_bytes, in_bytes, saved_in, vector_bytes
from asyncembed.errors import StoreError
from asyncembed.records import Chunk, EmbeddedChunk, EmbeddedText, text_id
from asyncembed.store.json_files import encode_record

IDS = np.arange(5, dtype=np.int32)


def test_the_size_of_a_file_is_what_would_be_written() -> None:
    generator = np.random.default_rng(1)
    for pieces in (["one piece"], ["two ", "pieces"]):
        text = "".join(pieces)
        vectors = [generator.standard_normal(384).astype(np.float32) for _ in range(1 + len(pieces))]
        chunks = [Chunk(0, n, piece, 4 * n, IDS, 3) for n, piece in enumerate(pieces)]
        embedded = tuple(
            EmbeddedChunk(c.text, c.start, c.n_tokens, vector) for c, vector in zip(chunks, vectors, strict=False)
        )
        real = len(encode_record(EmbeddedText(text_id(text), 0, None, text, vectors[-1], embedded, 3 * len(pieces))))
        estimate = file_bytes(text, chunks, vector_bytes(vectors, 384))
        assert abs(estimate - real) < 0.02 * real


def test_a_vector_that_could_not_be_measured_is_guessed() -> None:
    assert 8 * 384 < vector_bytes([], 384) < 16 * 384


def test_the_room_for_a_folder_that_is_not_there_is_that_of_the_one_above(tmp_path: Path) -> None:
    room = Room.at(tmp_path / "not" / "there")
    assert room.path == tmp_path
    assert room.free_bytes > 0
    assert room.taken_by(1) == room.block_bytes
    assert room.taken_by(room.block_bytes) == room.block_bytes
    assert room.taken_by(room.block_bytes + 1) == 2 * room.block_bytes
    assert not (tmp_path / "not").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        Room.at(tmp_path / "file" / "data")


def test_nothing_is_saved_in_a_folder_that_is_not_there_or_is_empty(tmp_path: Path) -> None:
    assert saved_in(tmp_path / "none") is None
    assert saved_in(tmp_path) is None


def test_a_sample_is_fair_and_the_same_each_time() -> None:
    def sampled() -> list[int]:
        sample = Sample(100)
        for first in range(0, 10_000, 10):
            sample.add(Chunk(owner, 0, "", 0, IDS, 3) for owner in range(first, first + 10))
        return [chunk.work for chunk in sample.chunks]

    owners = sampled()
    assert len(owners) == 100
    assert 4000 < np.mean(owners) < 6000
    assert owners == sampled()


def test_a_time_is_in_proportion_to_the_measured_speed() -> None:
    assert Speed(1000, 2.0).seconds_for(10_000) == 20.0
    assert Speed(0, 2.0).seconds_for(10_000) is None


def plan(**more: object) -> Plan:
    numbers: dict[str, object] = {
        "texts": 12, "to_embed": 10, "chunks": 11, "tokens": 500, "bytes": 5_000_000_000, "files": 18,
        "free_bytes": 9_000_000_000, "free_files": 100, "save_path": "out", "model": "m", "seconds": 65.0,
        "tokens_per_second": 7.7, "measured_tokens": 400, "load_seconds": 8.0,
    }  # fmt: skip
    return Plan(**{**numbers, **more})  # type: ignore[arg-type]  # numbers of several kinds


def test_the_words_give_time_and_room_and_how_they_are_known() -> None:
    shown = "\n".join(plan(repeats=1, cached=1, blank=2).lines("notes.csv"))
    assert shown.startswith("Dry run: nothing was embedded or written.")
    assert "notes.csv: 12 texts, 1 repeat, 2 blank rows" in shown
    assert "1 of them are in out so far" in shown
    assert "about 1 min 5 s after 8.0 s of loading: 8 tokens/s, measured on 400 tokens here" in shown
    assert "about 5.0 GB in 18 files; free: 9.0 GB and 100 files" in shown
    assert list(plan().warnings()) == []


def test_what_stands_in_the_way_is_warned_of() -> None:
    assert "will not fit" in next(plan(fits=False).warnings())
    [line] = plan(would_fail=2, first_failure="the text has no tokens").warnings()
    assert line == "2 texts would fail, the first because the text has no tokens"
    [line] = plan(dropped_tokens=1).warnings()
    assert "1 token of long texts would be cut off" in line


def test_an_unknown_time_is_said_to_be_unknown() -> None:
    assert "unknown" in "\n".join(plan(seconds=None).lines("notes.csv"))


def test_as_json_the_plan_says_that_it_is_one() -> None:
    assert plan().as_dict()["dry_run"] is True


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 bytes"), (512, "512 bytes"), (1_640_000, "1.6 MB"), (12 * 10**9, "12 GB"), (2 * 10**15, "2,000 TB")],
)
def test_amounts_are_told_in_words(number: int, words: str) -> None:
    assert in_bytes(number) == words
