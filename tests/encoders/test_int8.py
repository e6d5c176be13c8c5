"""Static int8 on a CPU: close to float32 on any text, the same in every run and beside any other, and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import EmbedOptions, embed_stream, load_encoder, open_embeddings
from asyncembed.cli.store import run as store
from asyncembed.encoders import graph_cache, int8
from asyncembed.encoders.openvino_encoder import supported_dtypes
from asyncembed.errors import ModelError, OptionsError, StoreMismatchError
from asyncembed.records import Batch, Chunk

pytestmark = pytest.mark.skipif("int8" not in supported_dtypes(), reason="this processor does not compute in int8")

UNLIKE = {
    "prose": "The ferry leaves the island at dusk, and whoever misses it stays until the morning.",
    "code": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ...",
    "word": "zither",
    "number": "1789",
    "German": "Auf dem Markt gibt es heute frischen Fisch, Brot und Blumen.",
    "Greek": "Το καράβι φεύγει το βράδυ από το παλιό λιμάνι.",
    "Japanese": "港の灯りが一つずつ消えていった。",
    "full length": "The tide turned before the last nets were in, and the wind came up. " * 40,
    "marks": "!!! ... (((",
}


def cosines(a: Any, b: Any) -> Any:
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


async def vectors_of(texts: list[str], **options: Any) -> Any:
    """Their vectors in int8."""
    stream = embed_stream(texts, **{"device": "cpu", "dtype": "int8", "save_path": None, **options})
    found = await stream
    assert (stream.summary.backend, stream.summary.dtype) == ("openvino", "int8")
    return np.stack([found[text] for text in texts])


async def test_texts_unlike_those_calibrated_on_have_vectors_close_to_those_of_encode(model: Any) -> None:
    texts = list(UNLIKE.values())
    expected = model.encode(texts)
    found = await vectors_of(texts, long_texts="truncate")
    close = cosines(found, expected)
    assert close.mean() >= 0.995, dict(zip(UNLIKE, close, strict=True))
    assert close.min() >= 0.98, dict(zip(UNLIKE, close, strict=True))


def test_text_has_the_same_vector_alone_and_beside_any_other() -> None:
    encoder = load_encoder(EmbedOptions(device="cpu", dtype="int8"))
    texts = [*list(UNLIKE.values())[:7], "a heron", "a boat at the mooring and the rain on it"]
    rows = encoder.tokenizer().tokenize(texts)
    chunks = [Chunk(None, 0, text, 0, row.ids, row.n_content) for text, row in zip(texts, rows, strict=True)]
    alone = np.concatenate([encoder.finish(encoder.start(Batch((chunk,)))) for chunk in chunks])
    together = encoder.finish(encoder.start(Batch(tuple(chunks))))
    assert cosines(alone, together).min() >= 0.9999


async def test_every_run_gives_the_same_vectors() -> None:
    texts = list(UNLIKE.values())
    first, second = await vectors_of(texts), await vectors_of(texts)
    assert np.array_equal(first, second)


async def test_folder_is_gone_on_with_after_its_graph_and_scales_were_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder's own scales are used, also where others would be found now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = list(UNLIKE.values())
    before = await vectors_of(texts, save_path=tmp_path / "data")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(int8, "calibrate", lambda *_: pytest.fail("scales were found anew"))
    for path in (tmp_path / "data" / "embeddings_data").iterdir():
        path.unlink()
    stream = embed_stream(texts, device="cpu", save_path=tmp_path / "data")  # the precision is the folder's
    again = await stream
    assert (stream.summary.dtype, stream.summary.embedded) == ("int8", len(texts))
    assert cosines(before, np.stack([again[text] for text in texts])).min() >= 0.9999
    assert store(["verify", str(tmp_path / "data"), "--recompute", "20"]) == 0
    assert capsys.readouterr().out.endswith("0 faults\n")


async def test_scales_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = await vectors_of(["a heron"])
    (kept,) = graph_cache.cache_root().glob("*/int8-*.json")
    with monkeypatch.context() as patch:
        patch.setattr(int8, "calibrate", lambda *_: pytest.fail("scales were found anew"))
        assert np.array_equal(await vectors_of(["a heron"]), first)
    for damaged in (b'{"scales": "aaaa"}', b"{}", b"[]", b""):  # found anew, and the same
        kept.write_bytes(damaged)
        assert np.array_equal(await vectors_of(["a heron"]), first)
    assert len(json.loads(kept.read_bytes())["scales"]) > 1000


async def test_precisions_do_not_mix_in_a_folder(tmp_path: Path) -> None:
    await vectors_of(["a heron"], save_path=tmp_path)
    recorded = open_embeddings(tmp_path).fingerprint
    assert recorded is not None
    assert recorded["quantization"]["method"] == "static, smoothed 0.9"
    with pytest.raises(StoreMismatchError, match='dtype is "int8" there, "float32" now'):
        await embed_stream(["a boat"], device="cpu", dtype="float32", save_path=tmp_path)


async def test_model_that_loses_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(int8, "MIN_MEAN_COSINE", 0.99999)
    with pytest.raises(ModelError, match=r"cannot run in int8.* a mean cosine of 0\.99\d\d only.*--dtype bfloat16"):
        await embed_stream(["a heron"], device="cpu", dtype="int8", save_path=None)
    assert list(graph_cache.cache_root().glob("*/int8-*.json")) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "torch"}, "cannot run in int8, which takes OpenVINO on a CPU: torch was asked for"),
        ({"device": "meta"}, "cannot run in int8, which takes OpenVINO on a CPU: it runs on a CPU here"),
    ],
)
async def test_int8_elsewhere_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        await embed_stream(["a heron"], save_path=None, **{"dtype": "int8", "device": "cpu", **options})


async def test_live_model_runs_in_int8_when_openvino_is_asked_for(model: Any) -> None:
    with pytest.raises(OptionsError, match='with backend="openvino" only'):
        await embed_stream(["a heron"], model=model, dtype="int8", save_path=None)
    found = await vectors_of(["a heron"], model=model, backend="openvino")
    assert cosines(found, model.encode(["a heron"])).min() >= 0.98


def test_scales_of_another_graph_are_not_taken() -> None:
    encoder: Any = load_encoder(EmbedOptions(device="cpu", dtype="int8"))
    scales = encoder.fingerprint()["quantization"]["scales"]
    import base64
    import zlib

    packed = zlib.decompress(base64.b64decode(scales))
    graph = graph_cache.cache_root().glob("*/model.xml")
    from asyncembed.encoders.openvino_encoder import import_openvino

    whole = import_openvino().Core().read_model(next(graph))
    for other in (packed[:-1], packed + b"\0"):
        assert int8.quantized(whole, base64.b64encode(zlib.compress(other)).decode()) is None


def test_calibration_texts_are_many_kinds_and_none_twice() -> None:
    texts = int8.texts()
    assert len(texts) == len(set(texts)) >= 50
    assert not any(text in UNLIKE.values() for text in texts)
