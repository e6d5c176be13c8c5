"""Models that strangers bring: each gives the vectors of `encode`, or is refused in one line when it is loaded."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import anyio
import numpy as np
import pytest

from asyncembed import (
    AsyncEmbedder,
    EmbeddingGenerator,
    EmbedOptions,
    ModelError,
    OptionsError,
    StoreMismatchError,
    TextError,
    embed_stream,
    load_encoder,
    open_embeddings,
)
from tests.world.architectures import KINDS, WIDTH, make_model, save_bare, word_piece

TEXTS = [
    "a",
    "heron",
    "two words",
    "!",
    " the boat ",
    "The boat at the mooring needs a new rope",
    "a heron stands in the river and waits for a fish, and then it waits again " * 2,
]
LONG = "the lamp on the quay is broken again and the crane needs a new rope " * 60

SAID = "no limit: longer texts are cut into chunks of 512 tokens"

Models = Callable[[str], Any]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs and hashes of these models are made here and not found from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A live model of each kind, made when it is first asked for."""
    made: dict[str, Any] = {}

    def model(kind: str) -> Any:
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder, without anything of sentence-transformers."""
    return save_bare("bert", tmp_path_factory.mktemp("bare-bert"))


def cosines(ours: Any, theirs: Any) -> Any:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


async def compare(model: Any, longest: int, backend: str, texts: list[str] = TEXTS) -> None:
    """Embed the texts and one that fills a row, in batches of all lengths, and compare with `encode` of each alone."""
    stream = embed_stream([*texts, LONG], model=model, backend=backend, long_texts="truncate", save_path=None)
    async with stream:
        vectors = await stream
    assert (stream.summary.backend, stream.summary.failed) == (backend, 0)
    reference = copy.deepcopy(model)
    reference.max_seq_length = longest
    if reference.tokenizer.pad_token is None:  # without one `encode` takes no text
        reference.tokenizer.pad_token = reference.tokenizer.eos_token
    expected = [reference.encode(text) for text in [*texts, LONG]]
    assert cosines([vectors[text] for text in [*texts, LONG]], expected).min() >= 0.99999


LONGEST = {"t5": 513, "xlnet": 514}
"""Tokens of the longest row; 64 for the others. Without a limit a chunk has 512, and special tokens."""


@pytest.mark.parametrize("kind", KINDS)
async def test_model_of_any_kind_on_torch_equals_encode(models: Models, kind: str) -> None:
    await compare(models(kind), LONGEST.get(kind, 64), "torch")


@pytest.mark.parametrize("kind", ["roberta", "t5"])
async def test_model_that_converts_on_openvino_equals_encode_at_full_length(models: Models, kind: str) -> None:
    await compare(models(kind), LONGEST.get(kind, 64), "openvino")


async def test_model_of_folder_without_padding_token_is_embedded(tmp_path: Path, models: Models) -> None:
    models("gpt2").save(str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    vectors = await embed_stream(TEXTS, model=tmp_path / "model", backend="torch", save_path=None)
    reference = models("gpt2")
    reference.tokenizer.pad_token = reference.tokenizer.eos_token  # without one `encode` takes no text
    assert cosines([vectors[text] for text in TEXTS], reference.encode(TEXTS)).min() >= 0.99999


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet", "longformer"])
def test_model_whose_positions_begin_after_padding_takes_two_tokens_less(models: Models, kind: str) -> None:
    assert models(kind).max_seq_length == 66
    assert load_encoder(EmbedOptions(model=models(kind))).max_tokens == 64


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet"])
async def test_model_whose_positions_begin_after_padding_folder_of_the_release_before_resumes(
    models: Models, tmp_path: Path, kind: str
) -> None:
    """That took the limit of the config for the longest row, and so for a chunk: rows as long as it failed."""
    before: Any = load_encoder(EmbedOptions(model=models(kind)))
    before.max_tokens = 66
    await embed_stream(["a heron"], model=before, save_path=tmp_path)
    fingerprint = open_embeddings(tmp_path).fingerprint or {}
    assert (fingerprint["max_tokens"], fingerprint["chunk_size"]) == (66, 64)
    for backend in ("torch", "openvino"):
        texts = ["a heron", f"{backend} {LONG}"]
        async with embed_stream(texts, model=models(kind), backend=backend, save_path=tmp_path) as stream:
            await stream
        assert (stream.summary.cached, stream.summary.embedded) == (1, 1)
    assert open_embeddings(tmp_path).fingerprint == fingerprint


def test_model_given_a_limit_above_its_positions_is_cut_at_these(models: Models) -> None:
    model = models("bert")
    model.max_seq_length = 1000
    try:
        assert load_encoder(EmbedOptions(model=model)).max_tokens == 64
    finally:
        model.max_seq_length = 64


async def test_model_without_a_limit_is_said_once_and_takes_another(models: Models, caplog: Any) -> None:
    async with embed_stream([LONG], model=models("t5"), save_path=None) as stream:
        vectors = await stream
    assert stream.summary.chunks > 1
    assert [message.partition("names ")[2] for message in caplog.messages] == [SAID]
    async with AsyncEmbedder(models("t5"), chunk_size=512) as embedder:
        assert cosines([await embedder.embed(LONG)], [vectors[LONG]]).min() >= 0.99999
    async with embed_stream([LONG], model=models("t5"), chunk_size=5000, save_path=None) as stream:
        await stream
    assert (stream.summary.chunks, len(caplog.messages)) == (1, 1)


async def test_model_without_a_limit_in_an_app_is_cut_too_and_said_once(models: Models, caplog: Any) -> None:
    async with AsyncEmbedder(models("t5")) as embedder:
        whole = await embedder.embed(LONG)
        await embed_stream([LONG], embedder=embedder, save_path=None)
    assert [message.partition("names ")[2] for message in caplog.messages] == [SAID]
    async with AsyncEmbedder(models("t5"), chunk_size=512) as embedder:
        assert cosines([await embedder.embed(LONG)], [whole]).min() >= 0.99999


async def test_model_without_a_limit_folder_made_with_whole_texts_resumes_in_chunks(
    models: Models, tmp_path: Path, caplog: Any
) -> None:
    """As folders were made before there were chunks of 512."""
    await embed_stream([LONG], model=models("t5"), chunk_size=(1 << 20) - 1, save_path=tmp_path)
    async with embed_stream([LONG, f"more: {LONG}"], model=models("t5"), save_path=tmp_path) as stream:
        await stream
    assert (stream.summary.cached, stream.summary.embedded) == (1, 1)
    assert stream.summary.chunks > 1
    assert [message.partition("names ")[2] for message in caplog.messages] == [SAID]


def test_model_without_a_limit_generator_resumes_in_chunks_and_says_so_once(
    models: Models, tmp_path: Path, caplog: Any
) -> None:
    asyncio.run(embed_stream(["a"], model=models("t5"), chunk_size=(1 << 20) - 1, save_path=tmp_path).run())
    with EmbeddingGenerator(models("t5"), save_path=tmp_path) as generator:
        generator([LONG])
        generator.fill_texts(iter([f"more: {LONG}"]))
        assert max(chunk.n_tokens for chunk in generator.find_best_chunks()) <= 512
    assert [message.partition("names ")[2] for message in caplog.messages] == [SAID]


async def test_model_without_a_limit_chunks_that_were_chosen_are_those_of_its_folder(
    models: Models, tmp_path: Path, caplog: Any
) -> None:
    await embed_stream(["a"], model=models("t5"), chunk_size=700, save_path=tmp_path)
    async with embed_stream([LONG], model=models("t5"), save_path=tmp_path) as stream:
        vectors = await stream
    whole = await embed_stream([LONG], model=models("t5"), chunk_size=700, save_path=None)
    assert cosines([vectors[LONG]], [whole[LONG]]).min() >= 0.99999
    assert [message.partition("names ")[2] for message in caplog.messages] == [SAID.replace("512", "700")]


@pytest.mark.parametrize(("kind", "text"), [("clip-text", "heron"), ("opt", "a")])
async def test_unknown_token_that_ends_each_text_is_not_counted(models: Models, kind: str, text: str) -> None:
    async with embed_stream([text], model=models(kind), save_path=None) as stream:
        assert (await stream)[text] is not None
    assert stream.summary.unknown_tokens == 0


async def test_unknown_words_only_with_unknown_token_at_the_end_fail(models: Models) -> None:
    async with embed_stream(["数", "heron 数"], model=models("clip-text"), save_path=None) as stream:
        vectors = await stream
    assert [failed.text for failed in stream.failures] == ["数"]
    assert "knows none" in str(stream.failures[0].error)
    assert (vectors["heron 数"] is not None, stream.summary.unknown_tokens) == (True, 2)


VOCABULARY = ["heron", "boat", "river", "lamp", "rope", "crane", "fish"]


def word_model(kind: str) -> Any:
    """A model of whole words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(5)
    if kind == "bag of words":
        weights = {word: 1.0 + number for number, word in enumerate(VOCABULARY)}
        return SentenceTransformer(modules=[modules.BoW(VOCABULARY, weights)], device="cpu")
    tokenizer: Any = WhitespaceTokenizer(["PADDING_TOKEN", *VOCABULARY], do_lower_case=True)
    n_words = len(VOCABULARY) + 1
    if kind == "word pieces":
        pieces = word_piece()
        tokenizer, n_words = PreTrainedTokenizerFast(tokenizer_object=pieces), pieces.get_vocab_size()
    words = modules.WordEmbeddings(tokenizer, rng.normal(size=(n_words, 6)).astype(np.float32))
    return SentenceTransformer(modules=[words, modules.Pooling(6)], device="cpu")


@pytest.mark.parametrize("kind", ["word vectors", "bag of words", "word pieces"])
@pytest.mark.parametrize("face", ["stream", "embedder", "generator", "folder"])
async def test_model_of_words_equals_encode(kind: str, face: str, tmp_path: Path) -> None:
    model = word_model(kind)
    texts = ["heron", "the boat on the river", "lamp rope rope crane", "fish and fish again, with a boat " * 50]
    expected = model.encode(texts)
    with anyio.fail_after(60):  # some waited for ever
        if face == "embedder":
            async with AsyncEmbedder(model) as embedder:
                ours = await embedder.embed(texts)
        elif face == "generator":
            found = await asyncio.to_thread(EmbeddingGenerator(model, save_path=str(tmp_path / "data")), iter(texts))
            ours = np.array([found[text] for text in texts])
        else:
            if face == "folder":
                model.save(str(tmp_path / "model"))
                model = tmp_path / "model"
            vectors = await embed_stream(texts, model=model, save_path=tmp_path / "data")
            ours = np.stack([vectors[text] for text in texts])
    assert cosines(ours, expected).min() >= 0.99999


@pytest.mark.parametrize("kind", ["word vectors", "bag of words", "word pieces"])
async def test_model_of_words_long_text_is_truncated_where_asked(kind: str) -> None:
    """Such a model gets the text and not our tokens."""
    model = word_model(kind)
    async with AsyncEmbedder(model, long_texts="truncate", chunk_size=2) as embedder:
        (cut,) = await embedder.embed(["heron boat lamp rope"])
    assert cosines([cut], [model.encode("heron boat")]).min() >= 0.99999


@pytest.mark.parametrize("kind", ["word vectors", "bag of words"])
async def test_model_of_words_text_of_unknown_words_fails(kind: str) -> None:
    async with AsyncEmbedder(word_model(kind)) as embedder:
        with pytest.raises(TextError, match="knows none of the text's 2 tokens"):
            await embedder.embed("zwei Worte")


async def test_model_of_words_with_other_weights_does_not_resume(tmp_path: Path) -> None:
    """It has no tensors that could be compared."""
    await embed_stream(["heron"], model=word_model("bag of words"), save_path=tmp_path)
    await embed_stream(["boat"], model=word_model("bag of words"), save_path=tmp_path)
    other = word_model("bag of words")
    other[0].word_weights = {}
    with pytest.raises(StoreMismatchError, match="weights"):
        await embed_stream(["lamp"], model=other, save_path=tmp_path)


def session_model(scale: float = 1.0) -> Any:
    """A model that is computed by a session of some other runtime: it holds nothing that torch knows of."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
    from transformers import PreTrainedTokenizerFast

    class Session(InputModule):
        config_keys: ClassVar[list[str]] = []

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_piece(), pad_token="[PAD]")
            self.run = np.sin(np.arange(1000 * 8).reshape(1000, 8) * scale).astype(np.float32)

        def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> Any:
            texts = [(prompt or "") + text for text in inputs]
            return dict(self.tokenizer(texts, padding=True, return_tensors="pt"))

        def forward(self, features: Any, **_: Any) -> Any:
            rows = self.run[features["input_ids"].numpy()] * features["attention_mask"].numpy()[:, :, None]
            return {**features, "sentence_embedding": torch.from_numpy(rows.mean(axis=1))}

        def get_embedding_dimension(self) -> int:
            return 8

        def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    return SentenceTransformer(modules=[Session()], device="cpu")


async def test_model_without_parameters_equals_encode_and_is_told_from_another(tmp_path: Path) -> None:
    model = session_model()
    vectors = await embed_stream(TEXTS, model=model, save_path=tmp_path)
    assert cosines([vectors[text] for text in TEXTS], [model.encode(text) for text in TEXTS]).min() >= 0.99999
    with pytest.raises(StoreMismatchError, match="weights"):
        await embed_stream(["a boat"], model=session_model(0.5), save_path=tmp_path)


async def test_model_quantised_by_torch_equals_encode(models: Models, tmp_path: Path) -> None:
    import copy
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(models("bert")), {torch.nn.Linear})
    vectors = await embed_stream(TEXTS, model=model, batch_size=1, save_path=tmp_path)  # its scale is the batch's
    assert cosines([vectors[text] for text in TEXTS], [model.encode(text) for text in TEXTS]).min() >= 0.99999


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("when", ["loading", "running"])
async def test_model_that_raises_what_no_future_holds_ends_the_wait(error: Any, when: str) -> None:
    model = session_model()
    healthy = type(model[0]).forward

    def forward(self: Any, features: Any, **more: Any) -> Any:
        if when == "loading" or len(features["input_ids"][0]) > 100:
            raise error
        return healthy(self, features, **more)

    model[0].forward = forward.__get__(model[0])
    with anyio.fail_after(60):
        if when == "loading":
            with pytest.raises((ModelError, RuntimeError), match=error.__name__):
                await AsyncEmbedder(model).__aenter__()
        else:
            async with AsyncEmbedder(model) as embedder:
                with pytest.raises((TextError, ModelError), match=error.__name__):
                    await embedder.embed(["a boat", "the boat " * 100])


def static_model(tokenizer: Any) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
async def test_static_model_texts_of_unknown_words_fail(kind: str) -> None:
    """Else all of them would get the vector of the one unknown token."""
    model = static_model(KINDS[kind].tokenizer())
    unknown, known = ["漢", "漢 漢 漢"], ["heron", "heron 漢"]
    async with embed_stream([*unknown, *known], model=model, save_path=None) as stream:
        vectors = await stream
    assert [failed.text for failed in stream.failures] == unknown
    assert all("knows none" in str(failed.error) for failed in stream.failures)
    assert cosines([vectors[text] for text in known], model.encode(known)).min() >= 0.99999


def without_pooling(bert: Path, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    SentenceTransformer(modules=[Transformer(str(bert))], device="cpu").save(str(folder))


def a_vector_for_each_token(bert: Path, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Transformer

    SentenceTransformer(modules=[Transformer(str(bert)), Dense(WIDTH, 8)], device="cpu").save(str(folder))


def pylate(bert: Path, folder: Path) -> None:
    without_pooling(bert, folder)
    found = json.loads((folder / "modules.json").read_text())
    found.append({"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"})
    (folder / "modules.json").write_text(json.dumps(found))


def reranker(bert: Path, folder: Path) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(bert, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(folder)


def cross_encoder(bert: Path, folder: Path) -> None:
    from sentence_transformers import CrossEncoder

    reranker(bert, folder.with_name("reranker"))
    CrossEncoder(str(folder.with_name("reranker")), device="cpu").save(str(folder))


def sparse_encoder(bert: Path, folder: Path) -> None:
    import transformers
    from sentence_transformers import SparseEncoder

    masked = folder.with_name("masked")
    transformers.BertForMaskedLM(transformers.AutoConfig.from_pretrained(bert)).save_pretrained(masked)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(masked)
    SparseEncoder(str(masked), device="cpu").save(str(folder))


def images(_: Path, folder: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')


def notes_only(_: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "README.md").write_text("no model")


REFUSED = [
    (without_pooling, "has no pooling module"),
    (a_vector_for_each_token, "has no pooling module"),
    (pylate, "is a ColBERT: it makes a vector of each token"),
    (reranker, "is a classifier or reranker"),
    (cross_encoder, "is a CrossEncoder: it makes scores of pairs"),
    (sparse_encoder, "is a SparseEncoder: it makes sparse vectors"),
    (images, "takes no texts"),
    (notes_only, "there is no model in"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
async def test_folder_of_another_kind_is_refused_when_it_is_loaded(
    bert: Path, tmp_path: Path, make: Callable[[Path, Path], None], reason: str
) -> None:
    make(bert, tmp_path / "model")
    for face in (
        AsyncEmbedder(tmp_path / "model").__aenter__(),
        embed_stream(["a"], model=tmp_path / "model", save_path=None).run(),
    ):
        with pytest.raises(ModelError, match=reason) as refused:
            await face
        assert "\n" not in str(refused.value)


def test_live_model_of_another_kind_is_refused(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder, SparseEncoder

    sparse_encoder(bert, tmp_path / "sparse")
    cross_encoder(bert, tmp_path / "cross")
    for live in (
        SparseEncoder(str(tmp_path / "sparse"), device="cpu"),
        CrossEncoder(str(tmp_path / "cross"), device="cpu"),
    ):
        with pytest.raises(ModelError, match=f"is a {type(live).__name__}"):
            load_encoder(EmbedOptions(model=live))


async def test_folder_of_bare_transformer_equals_encode_and_is_said(bert: Path, caplog: Any) -> None:
    from sentence_transformers import SentenceTransformer

    vectors = await embed_stream(TEXTS, model=bert, backend="torch", save_path=None)
    reference = SentenceTransformer(str(bert), device="cpu").encode(TEXTS)
    assert cosines([vectors[text] for text in TEXTS], reference).min() >= 0.99999
    assert any("does not say how tokens' vectors become one" in message for message in caplog.messages)


@pytest.mark.parametrize("name", ["", " "])
async def test_empty_model_name_is_refused(name: str, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bert)  # it is not the current folder
    with pytest.raises(ModelError, match="the model's name is empty"):
        await AsyncEmbedder(name).__aenter__()


def test_file_of_a_model_is_refused(bert: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the path of the folder"):
        load_encoder(EmbedOptions(model=bert / "model.safetensors"))


@pytest.fixture(scope="module")
def saved_bert(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved-bert") / "model"
    models("bert").save(str(folder))
    return folder


@pytest.mark.parametrize("rename", [False, True], ids=["lost", "renamed"])
def test_model_that_lacks_tensors_is_refused(saved_bert: Path, tmp_path: Path, rename: bool) -> None:
    """They would be random, and others in each run."""
    from safetensors.torch import load_file, save_file

    weights = shutil.copytree(saved_bert, tmp_path / "model") / "model.safetensors"
    tensors = load_file(weights)
    if rename:
        tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if "layer.1" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    first = "embeddings.LayerNorm.bias" if rename else "encoder.layer.1.attention.output.LayerNorm.bias"
    with pytest.raises(ModelError, match=f"is incomplete: .*, such as '{first}'"):
        load_encoder(EmbedOptions(model=tmp_path / "model", backend="torch"))


async def test_model_without_a_pooler_resumes_on_another_machine(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Language models come without one: its tensors are random, but always the same."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(bert)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "model")
    for machine, text in (("one", "a heron"), ("another", "a boat")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        await embed_stream([text], model=tmp_path / "model", backend="torch", save_path=tmp_path / "data")


def test_model_without_tokenizer_files_is_refused(saved_bert: Path, tmp_path: Path) -> None:
    """transformers makes up a tokenizer that knows nothing."""
    folder = shutil.copytree(saved_bert, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match="tokenizer without a vocabulary: files of it are missing"):
        load_encoder(EmbedOptions(model=folder, backend="torch"))


def test_model_with_fewer_vectors_than_tokens_is_refused_by_openvino(tmp_path: Path) -> None:
    """It would read vectors of other tokens, where torch fails the text."""
    model = make_model("bert", tmp_path)
    model.tokenizer.add_tokens(["herons"])
    with pytest.raises(ModelError, match="more tokens than it has vectors for"):
        load_encoder(EmbedOptions(model=model, backend="openvino"))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
async def test_model_with_fixed_positions_padded_on_the_left_equals_encode_of_each_text(
    kind: str, tmp_path: Path
) -> None:
    """On the left a text's positions, and so its vector, would depend on the longest text of its batch."""
    model = make_model(kind, tmp_path)
    model.tokenizer.padding_side = "left"
    async with embed_stream(TEXTS, model=model, token_limit=1000, save_path=None) as stream:
        vectors = await stream
    assert stream.summary.batches < len(TEXTS)
    # Without one `encode` takes no text.
    model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    assert cosines([vectors[text] for text in TEXTS], [model.encode(text) for text in TEXTS]).min() >= 0.99999


def test_loading_a_model_writes_nothing_of_the_libraries(
    saved_bert: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    load_encoder(EmbedOptions(model=saved_bert, backend="torch"))
    assert (capfd.readouterr().err, caplog.messages) == ("", [])


@pytest.mark.parametrize("backend", ["torch", "openvino"])
async def test_model_that_truncates_on_the_left_keeps_no_beginnings(bert: Path, tmp_path: Path, backend: str) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "truncation_side": "left"}))
    options: dict[str, Any] = {"model": folder, "backend": backend, "save_path": None}
    with pytest.raises(OptionsError, match="truncation_side='left'"):
        await embed_stream(["a heron"], long_texts="truncate", **options)
    assert len(await embed_stream(["a heron"], **options)) == 1


async def test_live_model_with_an_encode_of_its_own_is_said(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    from sentence_transformers import SentenceTransformer

    class Shouting(SentenceTransformer):
        def encode(self, sentences: Any, **how: Any) -> Any:
            return super().encode([text.upper() for text in sentences], **how)

    for kind, n_said in ((SentenceTransformer, 0), (Shouting, 1)):
        await embed_stream(["a heron"], model=kind(modules=list(models("bert")), device="cpu"), save_path=None)
        assert caplog.text.count("has an encode() of its own") == n_said
