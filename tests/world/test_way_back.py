"""The line of Python that a run prints gives the vectors of its own input, also in a folder that others share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed import embed_stream, open_embeddings, read_texts, text_id
from tests.cli.running import ENVIRONMENT, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs were embedded into `data`, which share a text; a bad row, a blank and a failed text among them."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "one.txt").write_text("a heron\na boat\na mooring\n")
    (folder / "it's two.csv").write_bytes(
        b"n,body\n1,a river\n2,a boat\n3,\n4,a river\n5,\xe9\n6,\xe9\xbe\x98\xe9\xbe\x98\n7,a boat\n8,more\n"
    )
    assert run("one.txt", folder=folder).returncode == 0
    return folder


def test_printed_line_reads_the_vectors_of_the_runs_own_input_in_its_order(folder: Path) -> None:
    done = run("it's two.csv", "--column", "body", "--on-bad-row", "skip", "--limit", "6", folder=folder)
    assert done.returncode == 1, done.stderr
    assert "saved in data, beside 2 texts of other runs; to read back these alone in Python" in done.stdout
    script = "\n".join(line.strip() for line in done.stdout.splitlines() if line.startswith("    "))
    script += "\nimport json; print(json.dumps([ids, [bool(row[0] == row[0]) for row in vectors], vectors.shape]))"
    back = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert back.returncode == 0, back.stderr
    texts = ["a river", "a boat", "a river", "龘龘", "a boat", "more"]
    ids, are_there, shape = json.loads(back.stdout)
    assert ids == [text_id(text) for text in texts]
    assert are_there == [True, True, True, False, True, True]
    assert shape == [6, 384]


def test_printed_line_after_standard_input_into_a_shared_folder_says_what_cannot_be(folder: Path) -> None:
    done = run("-", folder=folder, stdin="a heron\n")
    assert "texts of other runs: an input that is to be read back alone needs a folder of its own (-o)" in done.stdout
    assert "open_embeddings('data').to_numpy()" in done.stdout


def test_printed_line_where_nothing_else_lies_in_the_folder_reads_it_all(folder: Path) -> None:
    done = run("one.txt", "-o", "alone", folder=folder)
    assert "beside" not in done.stdout
    assert "saved in alone; to read them back in Python" in done.stdout


async def test_summary_counts_the_texts_that_are_none_of_the_input_once_each(tmp_path: Path) -> None:
    from tests.fakes import FakeEncoder

    model = FakeEncoder()
    await embed_stream(["a", "b", "c", "d", "e"], model=model, save_path=tmp_path)
    for texts, others in ((["a", "a", "b", "x", "x"], 3), (["a"], 5), (["a", "b", "c", "d", "e", "x"], 0)):
        async with embed_stream(texts, model=model, save_path=tmp_path) as stream:
            await stream.run()
        assert stream.summary.others == others
    async with embed_stream(["a"], model=model, save_path=tmp_path, overwrite=True) as stream:
        await stream.run()
    assert stream.summary.others == 0


def test_to_numpy_takes_a_file_of_texts_with_rows_that_were_skipped(folder: Path) -> None:
    (folder / "three.txt").write_bytes(b"a heron\n\xff\na boat\n")
    texts = read_texts(folder / "three.txt", on_bad_row="skip")
    ids, matrix = open_embeddings(folder / "data").to_numpy(texts, order="input")
    assert ids == [text_id("a heron"), text_id("a boat")]
    assert matrix.shape == (2, 384)
