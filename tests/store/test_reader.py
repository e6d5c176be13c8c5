"""Reading a folder back: by text, id and key, one by one and as a matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from asyncembed.errors import CorruptRecordError, OptionsError, StoreError
from asyncembed.records import Text, text_id
from asyncembed.store import Store, open_embeddings

from .making import DIM, FINGERPRINT, MADE_WITH, failure, ids, killed_after, opened, record, vector_of


def _names(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob("*"))


async def _three(path: Path) -> None:
    async with opened(path) as store:
        await store.commit([record("one", "a"), record("two", "b"), record("three")])
        await store.commit([record("one", "c"), failure("bad", "too long", "d")])


async def test_stored_embeddings_gives_each_text_by_text_id_and_key(tmp_path: Path) -> None:
    await _three(tmp_path)
    stored = open_embeddings(tmp_path)
    assert (len(stored), stored.dim, stored.fingerprint, stored.made_with) == (3, DIM, FINGERPRINT, MADE_WITH)
    assert "one" in stored
    assert "bad" not in stored
    assert 7 not in stored
    assert np.array_equal(stored["two"].embedding, vector_of("two"))
    assert stored.by_id(text_id("two")).text == "two"
    assert [stored.by_key(key).text for key in "abc"] == ["one", "two", "one"]
    assert sorted(stored.keys()) == ["a", "b", "c", "d"]
    assert stored.failures() == {text_id("bad"): "too long"}
    assert stored.ids() == sorted(ids("one", "two", "three"))
    assert [text.id for text in stored] == stored.ids()


async def test_stored_embeddings_missing_is_a_key_error_by_name(tmp_path: Path) -> None:
    await _three(tmp_path)
    stored = open_embeddings(tmp_path)
    for look in (lambda: stored["four"], lambda: stored.by_key("four"), lambda: stored.by_id("four")):
        with pytest.raises(KeyError, match="four"):
            look()
    with pytest.raises(KeyError):
        stored.by_key("d")  # a key of a text that failed


async def test_stored_embeddings_damaged_file_is_corrupt(tmp_path: Path) -> None:
    await _three(tmp_path)
    path = tmp_path / "embeddings_data" / f"{text_id('one')}.json"
    path.write_bytes(path.read_bytes().replace(b'"one"', b'"ONE"'))
    with pytest.raises(CorruptRecordError, match="not the one that its name says"):
        open_embeddings(tmp_path)["one"]


async def _put_stranger(folder: Path, other: Path) -> Path:
    """The file of "one" as a folder of other options has it, in the place of its own."""
    async with opened(other, {**FINGERPRINT, "prompt": "query: "}) as store:
        await store.commit([record("one")])
    path = folder / "embeddings_data" / f"{text_id('one')}.json"
    path.write_bytes((other / "embeddings_data" / path.name).read_bytes())
    return path


async def test_stored_embeddings_file_of_another_folder_is_refused_however_it_is_read(tmp_path: Path) -> None:
    await _three(tmp_path / "a")
    path = await _put_stranger(tmp_path / "a", tmp_path / "b")
    stored = open_embeddings(tmp_path / "a")
    for look in (lambda: stored["one"], lambda: stored.by_key("a"), stored.to_numpy, lambda: list(stored)):
        with pytest.raises(CorruptRecordError, match=f"{path.name}: it was made with other .*verify --remove-damaged"):
            look()
    assert stored["two"].text == "two"


async def test_stored_embeddings_file_that_does_not_say_what_made_it_is_read(tmp_path: Path) -> None:
    await _three(tmp_path)
    path = tmp_path / "embeddings_data" / f"{text_id('one')}.json"
    fields = orjson.loads(path.read_bytes())
    del fields["fingerprint"]
    path.write_bytes(orjson.dumps(fields))
    assert len(list(open_embeddings(tmp_path))) == 3


async def test_stored_embeddings_opened_before_a_job_overwrites_reads_what_it_makes(tmp_path: Path) -> None:
    await _three(tmp_path)
    stored = open_embeddings(tmp_path)
    store = Store(tmp_path, overwrite=True)
    await store.open()
    await store.claim({**FINGERPRINT, "prompt": "query: "}, MADE_WITH)
    await store.commit([record("one")])
    assert stored["one"].text == "one"
    assert stored.fingerprint == {**FINGERPRINT, "prompt": "query: "}
    await store.aclose()


async def test_stored_embeddings_while_a_job_writes_sees_what_is_saved(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        stored = open_embeddings(tmp_path)
        assert (len(stored), stored.keys(), stored.dim) == (0, [], DIM)
        await store.commit([record("one", "a"), failure("bad")])
        assert stored["one"].text == "one"
        assert stored.by_key("a").text == "one"
        assert list(stored.failures()) == ids("bad")
        await store.commit([record("bad", "b"), record("one", "c")])
        assert stored.failures() == {}
        assert sorted(stored.keys()) == ["a", "b", "c"]


async def test_stored_embeddings_without_ledger_and_index_is_read_and_not_written(tmp_path: Path) -> None:
    await _three(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    (tmp_path / "embeddings_index.json").unlink()
    names = _names(tmp_path)
    stored = open_embeddings(tmp_path)
    assert (len(stored), stored.dim, stored.fingerprint, stored.made_with) == (3, DIM, None, None)
    assert stored["one"].text == "one"
    assert (stored.keys(), stored.failures()) == ([], {})
    assert _names(tmp_path) == names


async def test_stored_embeddings_of_a_killed_run_knows_fingerprint_and_keys(tmp_path: Path) -> None:
    await killed_after(tmp_path, [record("one", "a")])
    (tmp_path / "embeddings_index.json").write_bytes(b"")
    stored = open_embeddings(tmp_path)
    assert (stored.fingerprint, stored.keys()) == (FINGERPRINT, ["a"])


async def test_to_numpy_all_is_sorted_by_id(tmp_path: Path) -> None:
    await _three(tmp_path)
    stored = open_embeddings(tmp_path)
    found, matrix = stored.to_numpy()
    assert found == stored.ids()
    assert (matrix.shape, matrix.dtype) == ((3, DIM), np.float32)
    assert np.array_equal(matrix, np.stack([text.embedding for text in stored]))
    assert stored.to_numpy(["two", "one", "two"])[0] == sorted(ids("one", "two"))
    assert stored.to_numpy(dtype=np.float64)[1].dtype == np.float64


async def test_to_numpy_in_input_order_gives_a_row_for_each_text(tmp_path: Path) -> None:
    await _three(tmp_path)
    texts = ["two", "one", "two", "three"]
    found, matrix = open_embeddings(tmp_path).to_numpy((Text(text) for text in texts), order="input")
    assert found == ids(*texts)
    assert np.array_equal(matrix, np.stack([vector_of(text) for text in texts]))


async def test_to_numpy_missing_text_raises_or_is_a_row_of_nan(tmp_path: Path) -> None:
    await _three(tmp_path)
    stored = open_embeddings(tmp_path)
    with pytest.raises(KeyError):
        stored.to_numpy(["one", "bad"], order="input")
    found, matrix = stored.to_numpy(["bad", "one"], order="input", missing="nan")
    assert found == ids("bad", "one")
    assert np.isnan(matrix[0]).all()
    assert np.array_equal(matrix[1], vector_of("one"))


@pytest.mark.parametrize(
    "arguments", [{"order": "input"}, {"texts": "one"}, {"order": "text"}, {"missing": "skip"}, {"dtype": np.int32}]
)
async def test_to_numpy_argument_that_cannot_be_is_refused(tmp_path: Path, arguments: dict[str, object]) -> None:
    await _three(tmp_path)
    with pytest.raises(OptionsError):
        open_embeddings(tmp_path).to_numpy(**arguments)


async def test_to_numpy_vectors_of_two_lengths_are_corrupt(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.commit([record("one"), record("two", dim=7)])
    with pytest.raises(CorruptRecordError, match="its vector has 7 numbers"):
        open_embeddings(tmp_path).to_numpy()


async def test_open_embeddings_of_what_is_no_folder_of_embeddings_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError):
            open_embeddings(path)
    store = Store(tmp_path)
    await store.open()
    await store.aclose()
    ids_, matrix = open_embeddings(tmp_path).to_numpy()
    assert (ids_, matrix.shape) == ([], (0, 0))
