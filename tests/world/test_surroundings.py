"""Loading a model leaves the program around as it was: its random numbers, its log, and its own live model."""

from __future__ import annotations

import gc
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from asyncembed import EmbedOptions, embed_stream, load_encoder
from tests.world.architectures import make_model

LOGS = ("huggingface_hub", "transformers", "transformers.modeling_utils")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    gc.collect()  # encoders remove their temporary graphs, and not in the event loop of another test


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT, saved."""
    folder = tmp_path_factory.mktemp("bert")
    make_model("bert", folder / "bare").save(str(folder / "model"))
    return folder / "model"


def surroundings() -> list[object]:
    """What the program has set."""
    levels = [logging.getLogger(name).level for name in LOGS]
    return [*levels, transformers_logging.is_progress_bar_enabled(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_models_loaded_at_once_leave_random_numbers_and_log_levels(model: Path, tmp_path: Path, backend: str) -> None:
    torch.manual_seed(11)
    before, start = surroundings(), threading.Barrier(4)

    def load(number: int) -> None:
        folder = shutil.copytree(model, tmp_path / str(number))
        (folder / "number.txt").write_text(str(number))  # each has a graph of its own
        start.wait(30)
        for _ in range(3):
            load_encoder(EmbedOptions(model=folder, backend=backend))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert surroundings() == before


def test_loading_a_model_seeds_no_gpu(model: Path) -> None:
    """Where there is none, torch remembers what is to be done to one as soon as it is used."""
    remembered = torch.cuda._lazy_seed_tracker.get_calls()
    seeds = [generator.initial_seed() for generator in torch.cuda.default_generators]
    load_encoder(EmbedOptions(model=model, backend="torch", device="cpu"))
    assert torch.cuda._lazy_seed_tracker.get_calls() == remembered
    assert [generator.initial_seed() for generator in torch.cuda.default_generators] == seeds


class _Meanwhile(logging.Handler):
    """Does something in a thread of its own when sentence-transformers says that it loads a model."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(logging.INFO)
        self._work: Callable[[], Any] | None = work

    def emit(self, record: logging.LogRecord) -> None:
        work, self._work = self._work, None
        if work is not None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(60)


def test_model_of_the_programs_own_that_lacks_tensors_meanwhile_is_not_ours(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = shutil.copytree(model, tmp_path / "lacking") / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "layer.1" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    library = logging.getLogger("sentence_transformers")
    handler = _Meanwhile(lambda: transformers.AutoModel.from_pretrained(tmp_path / "lacking"))
    with caplog.at_level(logging.INFO, "sentence_transformers"):
        library.addHandler(handler)
        try:
            load_encoder(EmbedOptions(model=model, backend="torch"))
        finally:
            library.removeHandler(handler)
    assert [True for message in caplog.messages if "LOAD REPORT" in message] == [True]


# --- a live model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
async def test_live_model_keeps_its_tokenizer_as_it_was(kind: str, backend: str, tmp_path: Path) -> None:
    """It pads on the left, where its positions would be others, and may have no padding token: that is ours to mend."""
    live = make_model(kind, tmp_path)
    live.tokenizer.padding_side = "left"
    texts = ["a", "the boat at the mooring needs a new rope"]
    before = (live.tokenizer.padding_side, live.tokenizer.pad_token, len(live.tokenizer))
    assert (before[1] is None) == (kind == "gpt2")
    expected = live.encode(texts) if kind == "bert" else None
    vectors = await embed_stream(texts, model=live, backend=backend, token_limit=1000, save_path=None)
    assert (live.tokenizer.padding_side, live.tokenizer.pad_token, len(live.tokenizer)) == before
    if expected is not None:
        np.testing.assert_array_equal(live.encode(texts), expected)
    live.tokenizer.pad_token = live.tokenizer.pad_token or live.tokenizer.eos_token
    alone = [live.encode(text) for text in texts]
    np.testing.assert_allclose([vectors[text] for text in texts], alone, atol=1e-4)


async def test_live_model_with_a_prompt_that_is_not_pooled_keeps_its_tokenizer(tmp_path: Path) -> None:
    """Such a model is asked for the prompt's length at each batch."""
    live = make_model("gpt2", tmp_path)
    live[1].include_prompt = False
    vectors = await embed_stream(["a boat"], model=live, prompt="query: ", backend="torch", save_path=None)
    assert live.tokenizer.pad_token is None
    live.tokenizer.pad_token = live.tokenizer.eos_token
    np.testing.assert_allclose(vectors["a boat"], live.encode("a boat", prompt="query: "), atol=1e-4)
