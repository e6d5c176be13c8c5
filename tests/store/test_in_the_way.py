"""What lies in the place of a per-text file and is none: a folder ends the run with its path, a link is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncembed.cli.store import run
from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.records import text_id
from asyncembed.store import Store, open_embeddings

from .making import FINGERPRINT, MADE_WITH, killed_after, opened, record


async def _replaced(folder: Path, *, killed: bool = False) -> Path:
    """Two texts are saved, and the file of "one" is taken away."""
    if killed:
        await killed_after(folder, [record("one"), record("two")])
    else:
        async with opened(folder) as store:
            await store.commit([record("one", "k"), record("two")])
    path = folder / "embeddings_data" / f"{text_id('one')}.json"
    path.unlink()
    return path


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("killed", [False, True])
async def test_job_names_a_folder_in_the_place_of_a_file_and_saves_the_rest(
    tmp_path: Path, killed: bool, durability: str
) -> None:
    path = await _replaced(tmp_path, killed=killed)
    path.mkdir()
    store = Store(tmp_path, durability=durability)
    await store.open()
    await store.claim(FINGERPRINT, MADE_WITH)
    await store.commit([record("three")])
    with pytest.raises(StoreError, match=f"{path.name}: there is a folder .* move that folder away") as caught:
        await store.commit([record("one")])
    assert "\n" not in str(caught.value)
    await store.aclose()
    assert not list(path.parent.glob(".*"))
    path.rename(tmp_path / "away")
    async with opened(tmp_path) as again:
        assert [found.is_done for found in await again.find(["one", "two", "three"])] == [False, True, True]
        await again.commit([record("one")])
    assert open_embeddings(tmp_path)["one"].text == "one"


async def test_job_replaces_a_link_to_nothing(tmp_path: Path) -> None:
    path = await _replaced(tmp_path)
    path.symlink_to("nowhere")
    async with opened(tmp_path) as store:
        assert store.n_done == 1
        await store.commit([record("one")])
    assert not path.is_symlink()
    assert open_embeddings(tmp_path)["one"].text == "one"


async def test_job_counts_a_link_to_a_file_as_there(tmp_path: Path) -> None:
    path = await _replaced(tmp_path)
    path.symlink_to(tmp_path / "elsewhere")
    async with opened(tmp_path / "other") as store:
        await store.commit([record("one")])
    (tmp_path / "other" / "embeddings_data" / path.name).rename(tmp_path / "elsewhere")
    async with opened(tmp_path) as store:
        assert store.n_done == 2
    assert open_embeddings(tmp_path)["one"].text == "one"


async def test_reader_and_verify_name_a_folder_in_the_place_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = await _replaced(tmp_path)
    path.mkdir()
    stored = open_embeddings(tmp_path)
    for look in (lambda: stored["one"], lambda: stored.by_key("k")):
        with pytest.raises(CorruptRecordError, match=f"{path.name}: it is a folder, not a file; move it away"):
            look()
    assert "one" not in stored  # as for a job, which makes it again
    assert [text.text for text in stored] == ["two"]
    for arguments in ([], ["--remove-damaged"]):
        assert run(["verify", *arguments, str(tmp_path)]) == 1
        first, last = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{path}: it is a folder, not a file")
        assert last.startswith("2 files read, 1 fault")
    assert path.is_dir()
