"""A job killed at any instant is gone on with: nothing torn, nothing lost, next to nothing computed twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from asyncembed import embed_stream, open_embeddings
from tests.conftest import ROOT

N_TEXTS = 400

_CHILD = """
import asyncio, sys
from asyncembed import embed_stream
from tests.job.test_killed import texts

async def main():
    async for record in embed_stream(texts(), save_path=sys.argv[1]):
        print(record.id, flush=True)

asyncio.run(main())
"""


def texts() -> list[str]:
    return [f"Note {i}: " + "the boat left the harbour before the storm. " * (1 + i % 4) for i in range(N_TEXTS)]


async def test_kill_minus_nine_loses_nothing_and_repeats_at_most_what_was_in_flight(model: Any, tmp_path: Path) -> None:
    """The real model in a real process; killed when some records have been delivered."""
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        delivered = [child.stdout.readline().strip() for _ in range(60)]
        child.kill()
        delivered += [line.strip() for line in child.stdout if line.endswith("\n")]
    assert all(len(identity) == 64 for identity in delivered)

    files = list((tmp_path / "embeddings_data").glob("*.json"))
    for file in files:  # each is whole
        assert json.loads(file.read_bytes())["id"] == file.stem
    saved = {file.stem for file in files}
    assert set(delivered) <= saved  # what was delivered had been saved
    assert len(saved) < N_TEXTS

    async with embed_stream(texts(), model=model, save_path=tmp_path) as stream:
        records = [record async for record in stream]
    assert len(records) == N_TEXTS
    assert stream.summary.cached == len(saved)  # nothing saved is computed again
    assert stream.summary.embedded == N_TEXTS - len(saved)

    ids, matrix = open_embeddings(tmp_path).to_numpy(texts(), order="input")
    assert len(set(ids)) == N_TEXTS
    expected = model.encode(texts())
    cosines = np.sum(matrix * expected, axis=1) / np.linalg.norm(matrix, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.999999
    index = json.loads((tmp_path / "embeddings_index.json").read_bytes())
    assert set(index["texts"]) == set(ids)
    assert not list(tmp_path.rglob("*.tmp"))
