"""Whatever happened to the files of a folder, it is read or refused clearly, and the next run makes it whole."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncembed import text_id
from tests.fuzzing import TEXTS, check_store, damaged, folder_seed, write_folder
from tests.store.making import FINGERPRINT, MADE_WITH

RECORD = f"embeddings_data/{text_id(TEXTS[0])}.json"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    root = tmp_path_factory.mktemp("seeds")
    return [folder_seed(root / name, killed=name == "killed") for name in ("clean", "killed")]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 1 << 40))
def test_damaged_folder_is_read_or_refused_and_made_whole(
    seeds: list[dict[str, bytes]], tmp_path: Path, number: int
) -> None:
    rng = random.Random(number)
    write_folder(tmp_path, damaged(rng.choice(seeds), rng))
    check_store(tmp_path)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=200),
    name=st.sampled_from(["embeddings_index.json", "ledger.sqlite", ".lock.owner", "errors.jsonl", RECORD]),
)
def test_file_of_any_bytes_is_read_or_refused_and_made_whole(
    seeds: list[dict[str, bytes]], tmp_path: Path, raw: bytes, name: str
) -> None:
    write_folder(tmp_path, {**seeds[0], name: raw})
    check_store(tmp_path)


@pytest.mark.parametrize("name", ["embeddings_index.json", "ledger.sqlite", ".lock.owner", "errors.jsonl", RECORD])
@pytest.mark.parametrize(
    "raw",
    [b"[" * 20_000, b'{"version":1,"fingerprint":' + b'{"a":' * 20_000, b'{"texts":{"\\u0061":' + b"[" * 20_000],
    ids=["lists", "fingerprint", "escaped"],
)
def test_nested_json_in_a_folder_takes_little_memory(
    seeds: list[dict[str, bytes]], tmp_path: Path, name: str, raw: bytes
) -> None:
    write_folder(tmp_path, {**seeds[0], name: raw})
    tracemalloc.start()
    try:
        check_store(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000


def test_text_that_is_lost_is_seen(seeds: list[dict[str, bytes]], tmp_path: Path) -> None:
    """The tests above can fail."""
    from asyncembed.store.files import StorePaths
    from asyncembed.store.writer import FolderWriter
    from tests.fuzzing import _check_done

    write_folder(tmp_path, seeds[0])
    writer = FolderWriter(StorePaths.of(tmp_path))
    writer.open()
    try:
        writer.claim(FINGERPRINT, MADE_WITH)
        (tmp_path / RECORD).unlink()
        with pytest.raises(AssertionError, match="called done"):
            _check_done(tmp_path, writer)
    finally:
        writer.close()
