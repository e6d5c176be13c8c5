"""The OpenVINO graph: made once, checked against torch, kept whole, and not trusted when it is not right."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import EmbedOptions, embed_stream, load_encoder
from asyncembed.encoders.graph_cache import cache_root, graph_key, load_graph
from asyncembed.encoders.loading import model_folder
from asyncembed.encoders.openvino_encoder import OpenVinoEncoder, supported_dtypes
from asyncembed.errors import ModelError
from asyncembed.records import Batch, Chunk
from tests.children import row_batch
from tests.conftest import ROOT

TEXTS = [f"A sentence about {word}. " * n for n, word in enumerate(["boats", "rain", "lamps", "数学", "music"], 1)]


@pytest.fixture(scope="module")
def converted() -> Any:
    """The default model, from the graph cache if it is there."""
    return load_encoder(EmbedOptions(backend="openvino", device="cpu"))


def cosines(a: Any, b: Any) -> Any:
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


async def test_openvino_is_the_default_on_a_cpu_and_gives_the_vectors_of_encode(converted: Any, model: Any) -> None:
    async with embed_stream(TEXTS, device="cpu", save_path=None) as stream:
        vectors = await stream
    assert stream.summary.backend == "openvino"
    assert stream.summary.dtype == "float32"
    assert cosines(np.stack([vectors[text] for text in TEXTS]), model.encode(TEXTS)).min() >= 0.99999


@pytest.mark.skipif("bfloat16" not in supported_dtypes(), reason="this processor does not compute in bfloat16")
async def test_bfloat16_stays_close(converted: Any, model: Any) -> None:
    async with embed_stream(TEXTS, device="cpu", dtype="bfloat16", save_path=None) as stream:
        vectors = await stream
    assert (stream.summary.backend, stream.summary.dtype) == ("openvino", "bfloat16")
    assert cosines(np.stack([vectors[text] for text in TEXTS]), model.encode(TEXTS)).min() >= 0.9999


async def test_live_model_stays_on_torch_unless_asked(model: Any) -> None:
    async with embed_stream(TEXTS, model=model, save_path=None) as stream:
        await stream
    assert stream.summary.backend == "torch"
    async with embed_stream(TEXTS, model=model, backend="openvino", save_path=None) as asked:
        vectors = await asked
    assert asked.summary.backend == "openvino"
    assert cosines(np.stack([vectors[text] for text in TEXTS]), model.encode(TEXTS)).min() >= 0.99999


def test_next_start_needs_neither_torch_nor_sentence_transformers(converted: Any) -> None:
    code = (
        "import sys; from asyncembed import EmbedOptions, load_encoder; load_encoder(EmbedOptions(device='cpu'));"
        "print([name for name in ('torch', 'sentence_transformers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_batches_under_way_in_all_slots_keep_their_own_vectors(converted: Any, model: Any) -> None:
    tokenizer = converted.tokenizer()
    batches = []
    for number, text in enumerate(TEXTS):
        rows = tokenizer.tokenize([text, text + " and more"])
        batches.append(Batch(tuple(Chunk(number, i, "", 0, r.ids, r.n_content) for i, r in enumerate(rows))))
    found: list[Any] = []
    handles: list[Any] = []
    for batch in batches * 4:
        if len(handles) == converted.slots:
            found.append(converted.finish(handles.pop(0)))
        handles.append(converted.start(batch))
    found += [converted.finish(handle) for handle in handles]
    expected = [model.encode([text, text + " and more"]) for text in TEXTS] * 4
    assert cosines(np.concatenate(found), np.concatenate(expected)).min() >= 0.99999


def test_inputs_live_until_their_batch_has_ended_whoever_waits_for_it(
    converted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model reads them where they are: a job that is cancelled forgets its batches while they run."""
    made: list[weakref.ref[Any]] = []
    rows = OpenVinoEncoder._rows

    def noting(encoder: OpenVinoEncoder, batch: Batch) -> list[Any]:
        arrays = rows(encoder, batch)
        made.extend(map(weakref.ref, arrays))
        return arrays

    monkeypatch.setattr(OpenVinoEncoder, "_rows", noting)
    handle = converted.start(row_batch(4, 200))
    gc.collect()
    assert all(array() is not None for array in made)
    converted.finish(handle)
    gc.collect()
    assert [array() for array in made] == [None] * len(made)


def test_damaged_graph_is_noticed_removed_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = model_folder("all-MiniLM-L6-v2")
    assert folder is not None
    load_encoder(EmbedOptions(backend="openvino", device="cpu"))
    weights = cache_root() / graph_key(folder) / "model.bin"
    with weights.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    with caplog.at_level(logging.WARNING):
        assert weights.exists()
        assert load_graph(graph_key(folder)) is None
    said = logging.getLogger("asyncembed")
    assert "model.bin is damaged" in caplog.text, (weights.exists(), said.level, said.disabled, said.propagate)
    assert not weights.exists()
    assert list(cache_root().glob(".*")) == []


class _Wrong:
    """A graph that gives other vectors than torch."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def create_infer_request(self) -> Any:
        request = self._compiled.create_infer_request()

        class Request:
            def infer(self, arrays: list[Any]) -> None:
                request.infer([np.roll(arrays[0], 1, axis=1), *arrays[1:]])

            def get_output_tensor(self, number: int) -> Any:
                return request.get_output_tensor(number)

        return Request()


def test_graph_that_does_not_agree_is_not_used_and_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The check itself runs for real; only the graph it is given computes something else."""
    from asyncembed.encoders import openvino_encoder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_graph = openvino_encoder.compile_graph
    monkeypatch.setattr(openvino_encoder, "compile_graph", lambda *args: _Wrong(compile_graph(*args)))
    with caplog.at_level(logging.INFO, logger="asyncembed"):
        encoder = load_encoder(EmbedOptions(device="cpu"))
    assert encoder.backend == "torch"
    assert "does not agree with torch" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="does not agree with torch"):  # known from then on: not tried again
        load_encoder(EmbedOptions(backend="openvino", device="cpu"))


def test_facts_in_the_cache_are_plain_json(converted: Any) -> None:
    folder = model_folder("all-MiniLM-L6-v2")
    assert folder is not None
    meta = json.loads((cache_root() / graph_key(folder) / "meta.json").read_bytes())
    assert meta["facts"]["dim"] == 384
    assert meta["facts"]["fingerprint"] == {**converted.fingerprint(), "dtype": "float32"}
