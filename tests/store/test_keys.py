"""A key belongs to the text that came with it last, whatever was there before and however a run ended."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.store import open_embeddings

from .making import killed_after, opened, record

_inputs = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abc"), st.sampled_from(["one", "two", "three"]), min_size=1), st.booleans()
    ),
    min_size=1,
    max_size=5,
)


async def _run(path: Path, texts: dict[str, str], killed: bool) -> None:
    stored = set() if not path.exists() else {text.text for text in open_embeddings(path)}
    records = []
    for key, text in texts.items():
        records.append(record(text, key, cached=text in stored))
        stored.add(text)
    if killed:
        await killed_after(path, records)
    else:
        async with opened(path) as store:
            await store.commit(records)


@settings(deadline=None, max_examples=60)
@given(inputs=_inputs)
def test_by_key_gives_the_text_that_came_with_it_last(inputs: list[tuple[dict[str, str], bool]]) -> None:
    last: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        for texts, killed in inputs:
            asyncio.run(_run(path, texts, killed))
            last |= texts
            stored = open_embeddings(path)
            assert {key: stored.by_key(key).text for key in last} == last


async def test_key_that_moved_leaves_the_other_keys_of_its_old_text(tmp_path: Path) -> None:
    path = tmp_path / "data"
    await _run(path, {"a": "one", "b": "one"}, killed=False)
    await _run(path, {"a": "two"}, killed=False)
    index = (path / "embeddings_index.json").read_text()
    assert index.count('"a"') == index.count('"b"') == 1
    assert "moved" not in index
