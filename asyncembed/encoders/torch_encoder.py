"""A SentenceTransformer run by torch, fed with token ids made elsewhere."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.base import FloatMatrix, Tokenizer
from asyncembed.encoders.tokenizers import FastTokenizer, SlowTokenizer
from asyncembed.encoders.weights import hash_tensors
from asyncembed.errors import ModelError, OptionsError
from asyncembed.records import Batch

_PROBE = "A probe: 3 words, and (some) punctuation."
_PLAIN_FEATURES = {"input_ids", "attention_mask", "token_type_ids", "modality", "prompt_length"}
_UNBOUNDED = 1 << 20  # tokenizers without a limit say 10**30


class TorchEncoder:
    """Runs a SentenceTransformer on rows of token ids.

    Where the model's own preprocessing does no more than tokenise and pad (checked on a probe text), the ids go
    straight in; otherwise the chunk's text goes through the model's own preprocessing.

    Args:
        model: The SentenceTransformer, in place on its device.
        prompt: Put before every chunk.
        prompt_name: Name of one of the model's prompts, if `prompt` is None.
        weights: The hash of its weights as they were stored, if known; None hashes the live ones whenever asked.
        name: What the user called it; None asks the model.

    Raises:
        OptionsError: The model has no prompt of that name.
        ModelError: The model has no tokenizer or no dimension.
    """

    backend = "torch"
    slots = 1

    def __init__(
        self,
        model: Any,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        weights: str | None = None,
        name: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.name = name if name is not None else _name_of(model)
        self.device = str(model.device)
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.dim = _dim_of(model)
        self.prompt = _prompt_of(model, prompt, prompt_name)
        self.prompts = {name: text or "" for name, text in model.prompts.items()}
        self._weights = weights
        self._tokenizer = model.tokenizer
        if self._tokenizer is None:
            raise ModelError(f"{self.name} has no tokenizer: it takes no texts")
        self.max_tokens = _max_tokens_of(model)
        self.fast_tokenizer = self._find_fast()
        self._features: dict[str, Any] = {}
        self._takes_ids = self._probe()
        pools_without = any(getattr(module, "include_prompt", True) is False for module in model.children())
        self._sees_prompts = pools_without or not self._takes_ids

    def __repr__(self) -> str:
        way = "ids" if self._takes_ids else "texts"
        return f"<TorchEncoder {self.name!r} {self.dtype} on {self.device} dim={self.dim} from {way}>"

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of the caller's own."""
        if self.fast_tokenizer is None:
            return SlowTokenizer(self._tokenizer)
        return FastTokenizer(self.fast_tokenizer, getattr(self._tokenizer, "unk_token", None))

    def start(self, batch: Batch) -> Any:
        """Run a batch; on a GPU the work is only queued.

        What the program around has set for its own work does not change the vectors: a live model that is being trained
        between batches, mixed precision in a thread that calls here.
        """
        import torch

        if self.model.training:
            self.model.eval()
        kind = self.model.device.type
        mixed = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.inference_mode(), mixed:
            if not self._sees_prompts:
                return self._forward(batch)
            vectors = torch.empty((len(batch.chunks), self.dim), device=self.model.device, dtype=torch.float32)
            for prompt, rows in _rows_by_prompt(batch).items():
                part = Batch(tuple(batch.chunks[row] for row in rows))
                vectors[rows] = self._forward(part, prompt)[:, : self.dim].float()
            return vectors

    def finish(self, handle: Any) -> FloatMatrix:
        """Wait for a batch: shape `(rows, dim)` float32."""
        matrix: FloatMatrix = handle.detach()[:, : self.dim].float().cpu().numpy()
        return matrix

    def free_memory(self) -> None:
        """Collect what failed batches left behind and give the device's cache back."""
        import torch

        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        elif self.device.startswith("mps"):
            torch.mps.empty_cache()
        elif self.device.startswith("xpu"):
            torch.xpu.empty_cache()

    def fingerprint(self) -> Mapping[str, Any]:
        """Hashes of weights, tokenizer and module settings, with dtype, dimension and longest row."""
        modules = [[type(module).__name__, _config_of(module)] for module in list(self.model.children())[1:]]
        return {
            # A live model's only now, as an unsaved job need not pay for it, and each time: it may have been trained.
            "weights": self._weights or hash_tensors(self.model.state_dict()),
            "tokenizer": _tokenizer_hash(self.fast_tokenizer, self._tokenizer),
            "modules": hashlib.sha256(json.dumps(modules, sort_keys=True, default=str).encode()).hexdigest(),
            "dtype": self.dtype,
            "max_tokens": self.max_tokens,
            "dim": self.dim,
        }

    def made_with(self) -> Mapping[str, Any]:
        """Model, device and versions."""
        versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "tokenizers")}
        return {"model": self.name, "device": self.device, "backend": self.backend, "versions": versions}

    def plain_features(self) -> tuple[dict[str, Any], bool] | None:
        """The constant features of a batch, and whether it takes types; None if it wants more than ids and mask."""
        if self._sees_prompts:
            return None
        return {name: value for name, value in self._features.items() if name != "prompt_length"}, self._types

    def _find_fast(self) -> RustTokenizer | None:
        backend = getattr(self._tokenizer, "backend_tokenizer", self._tokenizer)
        return backend if isinstance(backend, RustTokenizer) else None

    def _probe(self) -> bool:
        """Whether our ids are what the model's own preprocessing makes; remembers which features it wants."""
        if self.fast_tokenizer is None:
            return False
        features = dict(self.model.preprocess([_PROBE], prompt=self.prompt or None))
        if not {"input_ids", "attention_mask"} <= set(features) <= _PLAIN_FEATURES:
            return False
        own = self.tokenizer().tokenize([self.prompt + _PROBE])[0].ids
        self._features = {name: features[name] for name in ("modality", "prompt_length") if name in features}
        self._types = "token_type_ids" in features
        if self._types and bool(features["token_type_ids"].any()):
            return False
        theirs = features["input_ids"][0]
        return bool(len(theirs) == len(own) and (theirs.numpy() == own).all() and features["attention_mask"].all())

    def _forward(self, batch: Batch, prompt: str = "") -> Any:
        """Vectors of a batch, whose rows have one prompt where the model is told of it."""
        features = self._from_ids(batch) if self._takes_ids else self._from_texts(batch, prompt)
        if self._takes_ids and self._sees_prompts:
            features.pop("prompt_length", None)
            told = dict(self.model.preprocess([_PROBE], prompt=prompt or None))
            if "prompt_length" in told:
                features["prompt_length"] = told["prompt_length"]
        features = {
            name: value.to(self.model.device, non_blocking=True) if hasattr(value, "to") else value
            for name, value in features.items()
        }
        return self.model(features)["sentence_embedding"]

    def _from_ids(self, batch: Batch) -> dict[str, Any]:
        import torch

        rows, longest = len(batch.chunks), batch.longest
        ids = np.full((rows, longest), self._tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros((rows, longest), np.int64)
        left = self._tokenizer.padding_side == "left"
        for row, chunk in enumerate(batch.chunks):
            place = slice(longest - chunk.length, longest) if left else slice(0, chunk.length)
            ids[row, place] = chunk.ids
            mask[row, place] = 1
        features = {**self._features, "input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self._types:
            features["token_type_ids"] = torch.zeros((rows, longest), dtype=torch.int64)
        return features

    def _from_texts(self, batch: Batch, prompt: str) -> dict[str, Any]:
        texts = [chunk.text for chunk in batch.chunks]
        return dict(self.model.preprocess(texts, prompt=prompt or None))


def _rows_by_prompt(batch: Batch) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, chunk in enumerate(batch.chunks):
        rows.setdefault(chunk.prompt, []).append(row)
    return rows


def _name_of(model: Any) -> str:
    config = getattr(model[0], "config", None)
    return str(getattr(config, "_name_or_path", None) or type(model).__name__)


def _dim_of(model: Any) -> int:
    dim = model.get_embedding_dimension()
    if not dim:
        raise ModelError("the model does not say how many dimensions its vectors have")
    return int(dim)


def _prompt_of(model: Any, prompt: str | None, prompt_name: str | None) -> str:
    if prompt is not None:
        return prompt
    if prompt_name is None:
        prompt_name = model.default_prompt_name
        return str(model.prompts.get(prompt_name) or "") if prompt_name is not None else ""
    if prompt_name not in model.prompts:
        raise OptionsError(f"the model has no prompt named {prompt_name!r}; it has {sorted(model.prompts)}")
    return str(model.prompts[prompt_name] or "")


def _max_tokens_of(model: Any) -> int:
    limit = model.get_max_seq_length()
    if limit is None or limit > _UNBOUNDED:
        config = getattr(model[0], "config", None)
        limit = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
    return int(limit)


def _config_of(module: Any) -> Any:
    return module.get_config_dict() if hasattr(module, "get_config_dict") else repr(module)


def _tokenizer_hash(fast: RustTokenizer | None, tokenizer: Any) -> str:
    if fast is None:
        facts = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    else:
        bare = RustTokenizer.from_str(fast.to_str())
        bare.no_truncation()
        bare.no_padding()
        facts = bare.to_str()
    return hashlib.sha256(facts.encode()).hexdigest()
