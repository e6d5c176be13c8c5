"""A job looks at a few stored texts before it goes on: a sound folder passes, whatever the model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncembed import embed_stream
from asyncembed.cli.store import run as store
from tests.world.test_tasks import router

HOW = [{"long_texts": "truncate"}, {"chunk_overlap": 1}, {"prompt": "heron "}, {"truncate_dim": 8}, {}]


def models() -> dict[str, Any]:
    return {"tokens": "all-MiniLM-L6-v2", "texts": router(default_route="document")}


@pytest.mark.parametrize("reads", ["tokens", "texts"])
@pytest.mark.parametrize("how", HOW, ids=str)
async def test_sound_folder_of_cut_and_long_texts_is_gone_on_with(
    how: dict[str, Any], reads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is computed again is what was computed, also of a text that was cut."""
    texts = [" ".join(["the heron and boat on the river a boat"] * number) for number in (1, 2, 3, 4)]
    model = models()[reads]
    for n_texts in (3, 4):
        await embed_stream(texts[:n_texts], model=model, chunk_size=5, save_path=tmp_path / "data", **how)
    if reads == "tokens":  # a live model has no name by which it could be found
        assert store(["verify", str(tmp_path / "data"), "--recompute", "4"]) == 0
        assert "4 computed again, 0 faults" in capsys.readouterr().out


async def test_sound_folder_whose_prompt_runs_into_the_texts_is_gone_on_with(tmp_path: Path) -> None:
    """The prompt's last letters and the text's first make one token, where the text alone has two."""
    for texts in (["ing boats"], ["ing boats", "ing herons"]):
        await embed_stream(texts, prompt="find", save_path=tmp_path / "data")
