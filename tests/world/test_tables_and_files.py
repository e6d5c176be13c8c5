"""What scripts pass as texts: tables are refused by every face, open text files give the lines that a file gives."""

from __future__ import annotations

import codecs
import io
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiofiles
import pytest

from asyncembed import (
    AsyncEmbedder,
    EmbeddingGenerator,
    OptionsError,
    TextTypeError,
    embed_stream,
    open_embeddings,
    read_texts,
)
from asyncembed.langchain import AsyncEmbedEmbeddings


class Frame:
    """As pandas, Polars and Dask have it: iterated, it gives the names of its columns."""

    columns = ("id", "body")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


class Table:
    """As Arrow has it."""

    column_names = ("id", "body")
    columns = ([1, 2], ["A boat", "A crane"])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.columns)

    def to_pylist(self) -> list[Any]:
        return []


class Dataset:
    """As Hugging Face's `datasets` have it, of which a streamed one may not know its columns."""

    column_names = ("id", "body")

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter([{"id": "7", "body": "A boat"}])


TABLES = [Frame(), Table(), Dataset()]
CURE = r"is a table, not texts: pass one of its columns, as in table\['body'\].*; it has 'id', 'body'"


@pytest.mark.parametrize("table", TABLES)
async def test_table_is_refused_by_every_face_with_the_cure(table: Any, encoder: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=CURE):
        embed_stream(table, model=encoder, save_path=None)
    generator = EmbeddingGenerator(encoder, save_path=None)
    with pytest.raises(OptionsError, match=CURE):
        generator(table)
    with pytest.raises(OptionsError, match=CURE):
        generator.fill_texts(table)
    async with AsyncEmbedder(encoder) as embedder:
        for method in (embedder.embed, embedder.embed_query, embedder.embed_document, embedder.embed_records):
            with pytest.raises(TextTypeError, match=CURE):
                await method(table)
        with pytest.raises(TextTypeError, match=CURE):
            embedder.embed_nowait(table)
        with pytest.raises(TextTypeError, match=CURE):
            await AsyncEmbedEmbeddings(embedder).aembed_documents(table)
    await embed_stream(["A boat"], model=encoder, save_path=tmp_path)
    with pytest.raises(OptionsError, match=CURE):
        open_embeddings(tmp_path).to_numpy(table)


LINES = ["A boat", " two  words ", "A crane"]
RAW = "\ufeffA boat\r\n two  words \r\nA crane".encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(RAW)
    return path


def opened(path: Path) -> Iterator[Any]:
    """A file of lines, as scripts open it."""
    with path.open(encoding="utf-8") as file:
        yield file
    with path.open(encoding="utf-8", newline="") as file:
        yield file
    yield io.StringIO(RAW.decode())
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8", newline="") as file:
        file.write(RAW.decode())
        file.seek(0)
        yield file
    with codecs.open(str(path), encoding="utf-8") as file:
        yield file


async def test_open_text_file_gives_the_texts_that_reading_it_gives(path: Path, encoder: Any) -> None:
    assert [item.text for item in read_texts(path)] == LINES  # type: ignore[union-attr]
    async with AsyncEmbedder(encoder) as embedder:
        for file in opened(path):
            assert list(await embed_stream(file, embedder=embedder, save_path=None)) == LINES
        async with aiofiles.open(path, encoding="utf-8") as soon:
            assert list(await embed_stream(soon, embedder=embedder, save_path=None)) == LINES
        with path.open(encoding="utf-8") as file:
            records = await embedder.embed_records(file)  # type: ignore[arg-type]
        assert [record.text for record in records] == LINES


async def test_open_text_file_is_the_same_to_every_face(path: Path, encoder: Any, tmp_path: Path) -> None:
    await embed_stream(read_texts(path), model=encoder, save_path=tmp_path / "data")
    stored = open_embeddings(tmp_path / "data")
    with path.open(encoding="utf-8") as file:
        ids, _ = stored.to_numpy(file, order="input")
    assert len(ids) == 3
    generator = EmbeddingGenerator(encoder, save_path=None)
    with path.open(encoding="utf-8") as file:
        assert list(generator(file)) == LINES


def test_open_text_file_filled_by_steps_loses_its_line_ends(path: Path, encoder: Any) -> None:
    with path.open(encoding="utf-8") as file, EmbeddingGenerator(encoder, save_path=None) as generator:
        assert generator.fill_texts(file) == 3
        assert sorted(chunk.text for chunk in generator.find_best_chunks()) == sorted(LINES)


async def test_what_gives_bytes_or_is_a_path_is_refused_with_the_cure(path: Path, encoder: Any) -> None:
    with path.open("rb") as file, pytest.raises(OptionsError, match=r"gives bytes; pass read_texts\(file\)"):
        embed_stream(file, model=encoder, save_path=None)
    with pytest.raises(OptionsError, match=r"read_texts\(path\) for a file"):
        embed_stream(path, model=encoder, save_path=None)  # type: ignore[arg-type]


async def test_source_with_both_kinds_of_items_names_what_is_no_text(encoder: Any) -> None:
    async def cells() -> AsyncIterator[Any]:
        yield "A boat"
        yield Cell()

    class Cell:
        def as_py(self) -> str:
            return "A crane"

    async with embed_stream(cells(), model=encoder, save_path=None) as stream:
        errors = {record.index: record.error async for record in stream}
    assert errors == {0: None, 1: "item 1 of the input is a Cell, not a str; pass the column's to_pylist()"}
