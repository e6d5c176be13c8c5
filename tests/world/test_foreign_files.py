"""A results' folder in which other people's files lie: they stay as they are, and what they would cost is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from asyncembed import StoreError, embed_stream, open_embeddings
from asyncembed.records import text_id
from tests.cli.running import run

TEXTS = ["a heron on the river", "a boat at the mooring"]
IDENTITY = text_id(TEXTS[0])

FOREIGN = {
    "errors.jsonl": b'{"time": "2024-05-01", "level": "error", "message": "the nightly import failed"}\n',
    "embeddings_index.json": b'{"version": 3, "documents": {"%b": {"vector": [0.1]}}}' % IDENTITY.encode(),
    "ledger.sqlite": b"2024-05-01;42.00;rent\n",
    "embeddings_index.journal": b"Monday. Rain again.\n",
    ".lock": b"held by the backup\n",
    ".lock.owner": b"alice\n",
    f"embeddings_data/{IDENTITY}.json": b'{"vector": [0.1, 0.2], "model": "another program\'s"}',
}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
async def test_job_on_a_folder_with_a_foreign_file_of_a_name_of_ours_names_it_and_touches_nothing(
    name: str, overwrite: bool, tmp_path: Path, encoder: Any
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(FOREIGN[name])
    with pytest.raises(StoreError, match="is not asyncembed's") as caught:
        await embed_stream(TEXTS, model=encoder, save_path=tmp_path, overwrite=overwrite)
    assert str(tmp_path / name) in str(caught.value)
    assert "move it away, or choose another save path" in str(caught.value)
    assert everything(tmp_path) == {name: FOREIGN[name]}


async def test_job_in_a_folder_of_other_files_leaves_them_alone(tmp_path: Path, encoder: Any) -> None:
    theirs = {
        "notes.txt": b"one\n",
        "data.json": b"{}",
        "embeddings_data/notes.json": b"[1]",
        "embeddings_data/.hidden.tmp": b"2",
    }
    for name, content in theirs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for overwrite in (False, True):
        await embed_stream(TEXTS, model=encoder, save_path=tmp_path, overwrite=overwrite)
        assert theirs.items() <= everything(tmp_path).items()
    assert len(open_embeddings(tmp_path)) == 2


async def test_job_goes_on_with_its_own_files_however_they_are_formatted_or_damaged(
    tmp_path: Path, encoder: Any
) -> None:
    await embed_stream([*TEXTS, " "], model=encoder, save_path=tmp_path / "as-made")
    assert (tmp_path / "as-made" / "errors.jsonl").exists()

    def formatted(folder: Path) -> None:
        index = folder / "embeddings_index.json"
        index.write_text(json.dumps(json.loads(index.read_bytes()), indent=2))
        (folder / "errors.jsonl").write_text(json.dumps(json.loads((folder / "errors.jsonl").read_bytes())) + "\n")

    def garbage(folder: Path) -> None:
        (folder / "embeddings_index.json").write_bytes(b"\x00garbage")

    def emptied(folder: Path) -> None:
        (folder / "embeddings_index.json").write_bytes(b"")
        (folder / "errors.jsonl").write_bytes(b"")

    def orphaned_and_torn(folder: Path) -> None:
        os.unlink(folder / "embeddings_index.json")
        file = folder / "embeddings_data" / f"{IDENTITY}.json"
        file.write_bytes(file.read_bytes()[:100])

    for change in (formatted, garbage, emptied, orphaned_and_torn):
        folder = tmp_path / change.__name__
        shutil.copytree(tmp_path / "as-made", folder)
        change(folder)
        async with embed_stream(TEXTS, model=encoder, save_path=folder) as stream:
            await stream
        assert stream.summary.cached == (1 if change is orphaned_and_torn else 2)
        assert not (folder / "errors.jsonl").exists()


def test_command_line_on_an_oddly_named_file_knows_its_own_notes_again(tmp_path: Path) -> None:
    name = 'a "q" \\ b.txt'
    (tmp_path / name).write_bytes(b"one\n\xffbad\n")
    for _ in range(2):
        done = run(name, "--on-bad-row", "skip", folder=tmp_path)
        assert done.returncode == 1, done.stderr
    assert json.loads((tmp_path / "data" / "errors.jsonl").read_bytes())["place"] == f"{name}:2"


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--overwrite"]])
def test_command_line_on_a_foreign_file_exits_3_with_its_path(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a heron on the river\n")
    (tmp_path / "errors.jsonl").write_bytes(FOREIGN["errors.jsonl"])
    done = run("in.txt", "-o", ".", *more, folder=tmp_path)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"asyncembed: error: {tmp_path}/errors.jsonl: this file is not")
    assert (tmp_path / "errors.jsonl").read_bytes() == FOREIGN["errors.jsonl"]


def test_command_line_on_a_file_of_the_results_folder_itself_exits_2(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    noted = b'{"place":"in.txt:1","key":null,"reason":"not UTF-8","content":"x"}\n'
    (tmp_path / "data" / "errors.jsonl").write_bytes(noted)
    done = run("data/errors.jsonl", "--input-format", "txt", folder=tmp_path)
    assert done.returncode == 2
    assert "the run would replace it" in done.stderr
    assert (tmp_path / "data" / "errors.jsonl").read_bytes() == noted
