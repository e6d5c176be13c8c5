"""A SentenceTransformer run by torch, fed with token ids made elsewhere."""

from __future__ import annotations

import gc
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.base import CHUNK_OF_UNLIMITED, UNLIMITED_TOKENS, FloatMatrix, Tokenizer, padded
from asyncembed.encoders.prompts import (
    first_task,
    resolve_task,
    route_of,
    router_of,
    takes_tasks,
    task_limit,
    without_tasks,
)
from asyncembed.encoders.tokenizers import FastTokenizer, SlowTokenizer, WordTokenizer, cuts_left, unknown_of
from asyncembed.encoders.weights import hash_tensors
from asyncembed.errors import ModelError, OptionsError
from asyncembed.records import Batch, Chunk
from asyncembed.wording import first_line

_PROBE = "A probe: 3 words, and (some) punctuation."
_PLAIN_FEATURES = {"input_ids", "attention_mask", "token_type_ids", "modality", "prompt_length"}
_POSITIONS = (
    ("word_embeddings", "position_embeddings"),
    ("token_embedding", "position_embedding"),
    ("wte", "wpe"),
    ("embed_tokens", "embed_positions"),
)
"""What text models call their tables of tokens and of positions, which stand side by side in one module."""

_lending = threading.Lock()
"""Held while a tokenizer has a padding token that is not its own: another encoder may have the same live model."""


class TorchEncoder:
    """Runs a SentenceTransformer on rows of token ids.

    Where the model's own preprocessing does no more than tokenise and pad, or tokenise for a bag of embeddings (checked
    on a probe text), the ids go straight in; otherwise, and always in a model that has several tasks, the chunk's text
    goes through the model's own preprocessing.

    Raises:
        OptionsError: The model has no prompt of that name.
        ModelError: The model makes no vector of a text; the message says why.
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
        import torch

        self.model = model.eval()
        self.name = name if name is not None else _name_of(model)
        self.device = str(model.device)
        parameter = next(model.parameters(), None)  # a bag of words has none, nor has the session of another runtime
        self.dtype = "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")
        self.prompt = _prompt_of(model, prompt, prompt_name)
        self.prompts = {name: text or "" for name, text in model.prompts.items()}
        self._weights = weights
        self._tokenizer = _tokenizer_of(model)
        if self._tokenizer is None:
            raise ModelError(f"the model {self.name!r} takes no texts: it has no tokenizer")
        if callable(self._tokenizer) and len(self._tokenizer) <= len(self._tokenizer.all_special_ids):
            raise ModelError(f"the model {self.name!r} has a tokenizer without a vocabulary: files of it are missing")
        self.max_tokens = _max_tokens_of(model)
        # What looks at words one by one takes a text of any length as a whole.
        self.default_chunk_size = CHUNK_OF_UNLIMITED if model.transformers_model is not None else None
        self.fast_tokenizer = _fast(self._tokenizer)
        # A static model averages a table's rows: there is nothing to pad, and no token that stands for the text.
        self.pads = not hasattr(model[0], "embedding") or not isinstance(model[0].embedding, torch.nn.EmbeddingBag)
        self.unknown = unknown_of(self._tokenizer)
        self.has_routes = router_of(model) is not None
        self.first_task = first_task(model)
        self._takes_tasks = takes_tasks(model)
        self._tried: set[str] = set()
        self._running = threading.Lock()
        self._cutters: dict[str | None, Tokenizer] = {}  # the model's thread alone uses them
        self.pads_left = getattr(self._tokenizer, "padding_side", "right") == "left"
        with _able_to_pad(self._tokenizer):
            self.pad_id: int = getattr(self._tokenizer, "pad_token_id", None) or 0
        self._features: dict[str, Any] = {}
        self._takes_ids = self._probe()
        pools_without = any(getattr(module, "include_prompt", True) is False for module in model.children())
        self._sees_prompts = pools_without or not self._takes_ids
        self.dim = self._find_dim()
        self._choose_side()

    def __repr__(self) -> str:
        way = "ids" if self._takes_ids else "texts"
        return f"<TorchEncoder {self.name!r} {self.dtype} on {self.device} dim={self.dim} from {way}>"

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of the caller's own."""
        return _copy_of(self._tokenizer, self.unknown, with_special_tokens=self.pads)

    def resolve_task(self, task: str | None) -> str | None:
        """The task as far as it matters to the model."""
        return resolve_task(self.model, task) if self._takes_tasks else without_tasks(task)

    def input_of(self, task: str | None) -> tuple[Tokenizer, int]:
        """A tokenizer of the caller's own, and the most tokens of a row, for a task. May be called from any thread."""
        if not self._takes_tasks:
            return self.tokenizer(), self.max_tokens
        route = route_of(self.model, task if self.has_routes else None)
        self._try(task)
        tokenizer, unknown = _tokenizer_of(route) or self._tokenizer, self.unknown
        if tokenizer is not self._tokenizer:
            unknown = unknown_of(tokenizer)
        return _copy_of(tokenizer, unknown), min(_max_tokens_of(route), task_limit(route, task) or UNLIMITED_TOKENS)

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
        with self._running, torch.inference_mode(), mixed:
            if not self._sees_prompts:
                return self._forward(batch)
            vectors = torch.empty((len(batch.chunks), self.dim), device=self.model.device, dtype=torch.float32)
            for (prompt, task), rows in _rows_by_instruction(batch).items():
                found = self._forward(Batch(tuple(batch.chunks[row] for row in rows)), prompt, task)
                if self.has_routes and found.shape[1] != self.dim and self.model.truncate_dim is None:
                    raise ValueError(f"task={task!r} gives vectors of {found.shape[1]} numbers, not of {self.dim}")
                vectors[rows] = found[:, : self.dim].float()
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
            "weights": self._find_weights(),
            "tokenizer": _tokenizer_hash(self.fast_tokenizer, self._tokenizer),
            "modules": hashlib.sha256(json.dumps(modules, sort_keys=True, default=str).encode()).hexdigest(),
            "dtype": self.dtype,
            "max_tokens": _stated_limit(self.model),
            "dim": self.dim,
        }

    def made_with(self) -> Mapping[str, Any]:
        """Model, device and versions."""
        versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "tokenizers")}
        return {"model": self.name, "device": self.device, "backend": self.backend, "versions": versions}

    def plain_features(self) -> tuple[dict[str, Any], bool] | None:
        """The constant features of a batch, and whether it takes types; None if it wants more than ids and mask."""
        if self._sees_prompts or not self.pads:
            return None
        return {name: value for name, value in self._features.items() if name != "prompt_length"}, self._types

    def _try(self, task: str | None) -> None:
        """Have the model itself say whether it takes a task, where only it knows."""
        if self.has_routes or task is None or task in self._tried:
            return
        import torch

        try:
            with self._running, torch.inference_mode():
                features = self._on_device(self._preprocess([_PROBE], "", task))
                self.model(features, task=task)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise OptionsError(f"the model does not take task={task!r}: {first_line(error)}") from error
        self._tried.add(task)

    def _probe(self) -> bool:
        """Whether our ids are what the model's own preprocessing makes; remembers which features it wants."""
        if self.fast_tokenizer is None or self._takes_tasks:
            return False
        features = self._features_of_probe()
        own = self.tokenizer().tokenize([self.prompt + _PROBE])[0].ids
        if not self.pads:
            is_bag = set(features) == {"input_ids", "offsets"}
            return is_bag and np.array_equal(features["input_ids"].numpy(), own)
        if not {"input_ids", "attention_mask"} <= set(features) <= _PLAIN_FEATURES:
            return False
        self._features = {name: features[name] for name in ("modality", "prompt_length") if name in features}
        self._types = "token_type_ids" in features
        if self._types and bool(features["token_type_ids"].any()):
            return False
        theirs = features["input_ids"][0]
        return bool(len(theirs) == len(own) and (theirs.numpy() == own).all() and features["attention_mask"].all())

    def _find_dim(self) -> int:
        """Dimensions of a vector, known from one: a model may not say it, or say that of its tokens' vectors."""
        found = self._output_of_probe().get("sentence_embedding")
        if found is None:
            raise _no_pooling(self.name)
        if found.ndim != 2 or len(found) != 1:
            raise ModelError(f"the model {self.name!r} makes a result of shape {list(found.shape)} of one text")
        return int(min(found.shape[1], self.model.truncate_dim or found.shape[1]))

    def _choose_side(self) -> None:
        """Pad on the right where padding on the left, as the tokenizer says, would give a text other positions."""
        if not self._takes_ids or not self.pads_left:
            return
        tokenizer = self.tokenizer()
        probe, longer = (Chunk(0, 0, "", 0, tokenizer.tokenize([text])[0].ids, 1) for text in ("A probe", _PROBE))
        alone = self.finish(self.start(Batch((probe,))))[0]
        beside = self.finish(self.start(Batch((probe, longer))))[0]
        if float(alone @ beside) < 0.9999 * float(np.linalg.norm(alone) * np.linalg.norm(beside)):
            self.pads_left = False

    def _output_of_probe(self) -> Mapping[str, Any]:
        import torch

        try:
            with self._running, torch.inference_mode():
                return dict(self.model(self._on_device(self._features_of_probe()), **self._told(self.first_task)))
        except KeyError as error:
            if error.args == ("sentence_embedding",):  # asked for by a module that comes after the pooling
                raise _no_pooling(self.name) from error
            raise _no_vector(self.name, error) from error
        except ModelError:
            raise
        except Exception as error:
            raise _no_vector(self.name, error) from error

    def _features_of_probe(self) -> dict[str, Any]:
        try:
            return self._preprocess([_PROBE], self.prompt, self.first_task)
        except Exception as error:
            raise _no_vector(self.name, error) from error

    def _preprocess(self, texts: list[str], prompt: str, task: str | None) -> dict[str, Any]:
        """What the model's own preprocessing makes of texts."""
        with _able_to_pad(_tokenizer_of(route_of(self.model, task if self.has_routes else None))):
            return dict(self.model.preprocess(texts, prompt=prompt or None, **self._told(task)))

    def _find_weights(self) -> str:
        if not self._shows_weights():
            return self._hash_behaviour()
        return self._weights or hash_tensors(self.model.state_dict())

    def _shows_weights(self) -> bool:
        """Whether tensors are all that the first module computes with.

        They are not in a bag of words, a session of another runtime, or layers that torch has quantised.
        """
        values = self.model[0].state_dict().values()
        return bool(values) and all(hasattr(value, "is_floating_point") for value in values)

    def _hash_behaviour(self) -> str:
        """In place of weights: the settings and, rounded so that any machine finds the same, a vector."""
        vector = self._output_of_probe()["sentence_embedding"][0].float().cpu().numpy()
        rounded = np.round(vector / max(float(np.linalg.norm(vector)), 1e-9), 2) + 0.0
        facts = json.dumps([_config_of(self.model[0]), rounded.tolist()], sort_keys=True, default=str)
        return hashlib.sha256(facts.encode()).hexdigest()

    def _on_device(self, features: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.model.device, non_blocking=True) if hasattr(value, "to") else value
            for name, value in features.items()
        }

    def _told(self, task: str | None) -> dict[str, str]:
        return {} if task is None else {"task": task}

    def _forward(self, batch: Batch, prompt: str = "", task: str | None = None) -> Any:
        """Vectors of a batch, whose rows have one prompt and task where the model is told of them."""
        features = self._from_ids(batch) if self._takes_ids else self._from_texts(batch, prompt, task)
        if self._takes_ids and self._sees_prompts:
            features.pop("prompt_length", None)
            probe = self._preprocess([_PROBE], prompt, None)
            if "prompt_length" in probe:
                features["prompt_length"] = probe["prompt_length"]
        return self.model(self._on_device(features), **self._told(task))["sentence_embedding"]

    def _from_ids(self, batch: Batch) -> dict[str, Any]:
        import torch

        rows = [chunk.ids for chunk in batch.chunks]
        if not self.pads:
            starts = np.cumsum([0, *map(len, rows[:-1])])
            return {"input_ids": torch.from_numpy(np.concatenate(rows)), "offsets": torch.from_numpy(starts).int()}
        arrays = padded(rows, self.pad_id, on_left=self.pads_left)
        names = ("input_ids", "attention_mask", "token_type_ids")[: 3 if self._types else 2]
        return {**self._features, **dict(zip(names, map(torch.from_numpy, arrays), strict=False))}

    def _from_texts(self, batch: Batch, prompt: str, task: str | None) -> dict[str, Any]:
        texts = [chunk.text for chunk in batch.chunks]
        if any(chunk.is_cut for chunk in batch.chunks):
            if task not in self._cutters:
                self._cutters[task] = self.input_of(task)[0]
            spans = self._cutters[task].spans
            for row, chunk in enumerate(batch.chunks):
                if chunk.is_cut:
                    texts[row] = chunk.text[: spans(chunk.text)[chunk.n_tokens - 1][1]]
        return self._preprocess(texts, prompt, task)


def _rows_by_instruction(batch: Batch) -> dict[tuple[str, str | None], list[int]]:
    rows: dict[tuple[str, str | None], list[int]] = {}
    for row, chunk in enumerate(batch.chunks):
        rows.setdefault((chunk.prompt, chunk.task), []).append(row)
    return rows


def _fast(tokenizer: Any) -> RustTokenizer | None:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return backend if isinstance(backend, RustTokenizer) else None


def _copy_of(tokenizer: Any, unknown: str | None, *, with_special_tokens: bool = True) -> Tokenizer:
    fast = _fast(tokenizer)
    if fast is not None:
        cuts = cuts_left(tokenizer)
        return FastTokenizer(fast, unknown, cuts_left=cuts, with_special_tokens=with_special_tokens)
    return SlowTokenizer(tokenizer) if callable(tokenizer) else WordTokenizer(tokenizer)


def _name_of(model: Any) -> str:
    config = getattr(model[0], "config", None)
    return str(getattr(config, "_name_or_path", None) or type(model).__name__)


def _no_pooling(name: str) -> ModelError:
    return ModelError(
        f"the model {name!r} has no pooling module: it makes a vector of each token, as ColBERT models do, and not one "
        "of the text. Give a model that was made for embeddings of texts"
    )


def _no_vector(name: str, error: Exception) -> ModelError:
    return ModelError(f"the model {name!r} cannot embed a text: {type(error).__name__}: {first_line(error)}")


def _tokenizer_of(model: Any) -> Any:
    """The model's tokenizer; None if there is none."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is not None and not callable(tokenizer):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # one of transformers, dressed up as one of words
    return tokenizer


@contextmanager
def _able_to_pad(tokenizer: Any) -> Iterator[None]:
    """With a padding token for a while, where there is none: the model may be live, and the user's.

    Models that were made to continue texts have none, and `encode` refuses even one text then. Any token will do: the
    mask hides it.
    """
    with _lending:
        is_lent = getattr(tokenizer, "pad_token", "") is None
        if is_lent:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
            try:
                yield
            finally:
                tokenizer.pad_token = None
    if not is_lent:
        yield


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
    """Most tokens of a row: what the model states, but no more than it has positions for, or its tokenizer leaves.

    One of transformers is told anew by each call what to cut off; another is as it was saved.
    """
    truncation = model.tokenizer.truncation if isinstance(model.tokenizer, RustTokenizer) else None
    cut = truncation["max_length"] if truncation is not None else UNLIMITED_TOKENS
    return min(_stated_limit(model), _n_positions(model[0]), cut)


def _stated_limit(model: Any) -> int:
    """Most tokens of a row as the model says, or its config does: what folders record, also where it is too much."""
    limit = model.get_max_seq_length()
    if not _is_limit(limit):
        limit = getattr(getattr(model[0], "config", None), "max_position_embeddings", None)
    return int(limit) if _is_limit(limit) else UNLIMITED_TOKENS


def _is_limit(value: Any) -> bool:
    """Whether it is a limit: tokenizers without one say 10**30, XLNet's config -1."""
    return value is not None and 0 < value <= UNLIMITED_TOKENS


def _n_positions(module: Any) -> int:
    """Positions that a model of texts has learnt vectors for; those up to the padding token's number are never used."""
    found = [UNLIMITED_TOKENS]
    for part in module.modules():
        for tokens, positions in _POSITIONS:
            table: Any = getattr(part, positions, None)
            if hasattr(table, "num_embeddings") and hasattr(getattr(part, tokens, None), "num_embeddings"):
                unused = table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0)
                found.append(table.num_embeddings - unused)
    return min(found)


def _config_of(module: Any) -> Any:
    return module.get_config_dict() if hasattr(module, "get_config_dict") else repr(module)


def _tokenizer_hash(fast: RustTokenizer | None, tokenizer: Any) -> str:
    if fast is None:
        facts = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True, default=list)
    else:
        bare = RustTokenizer.from_str(fast.to_str())
        bare.no_truncation()
        bare.no_padding()
        facts = bare.to_str()
    return hashlib.sha256(facts.encode()).hexdigest()
