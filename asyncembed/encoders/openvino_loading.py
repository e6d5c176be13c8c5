"""Find a checked OpenVINO graph for a model, or make one from the torch model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncembed.encoders.graph_cache import (
    CachedGraph,
    GraphFacts,
    forget_failure,
    graph_key,
    known_failure,
    load_graph,
    remember_failure,
    resolve_prompt,
    store_graph,
)
from asyncembed.encoders.openvino_encoder import OpenVinoEncoder, compile_graph, import_openvino, supported_dtypes
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import EmbedOptions

if TYPE_CHECKING:
    from asyncembed.encoders.torch_encoder import TorchEncoder

logger = logging.getLogger("asyncembed")


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def load_cached(folder: Path, options: EmbedOptions, dtype: str) -> OpenVinoEncoder | None:
    """The encoder from the cache, without torch; None if its graph was not made yet.

    Raises:
        ModelError: It could not be made before, for the reason given.
        OptionsError: The model has no prompt of that name.
    """
    key = graph_key(folder)
    if (reason := known_failure(key)) is not None:
        raise ModelError(reason)
    graph = load_graph(key)
    return _encoder(graph, options, dtype) if graph is not None else None


def convert_and_keep(encoder: TorchEncoder, folder: Path | None, options: EmbedOptions, dtype: str) -> OpenVinoEncoder:
    """Convert a torch encoder, in float32 on the CPU, check the graph, and keep it.

    Raises:
        ModelError: It does not convert or does not agree; remembered, so that the next start does not try again.
    """
    key = graph_key(folder) if folder is not None else _key_of(encoder)
    try:
        graph = _make(encoder, key)
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        message = reason if isinstance(error, ModelError) else f"it does not convert: {type(error).__name__}: {reason}"
        remember_failure(key, message)
        raise ModelError(message) from error
    forget_failure(key)
    return _encoder(graph, options, dtype)


def check_dtype(dtype: str) -> str | None:
    """Why this CPU cannot compute in a precision; None if it can."""
    if dtype in supported_dtypes():
        return None
    return f"this processor does not compute in {dtype}"


def _make(encoder: TorchEncoder, key: str) -> CachedGraph:
    from asyncembed.encoders.graph import check, convert

    ov = import_openvino()
    plain = encoder.plain_features()
    if plain is None or encoder.fast_tokenizer is None:
        raise ModelError("it takes more than token ids and a mask")
    features, with_types = plain
    model = encoder.model
    if encoder.fast_tokenizer.get_vocab_size() > model.transformers_model.get_input_embeddings().num_embeddings:
        raise ModelError("its tokenizer has more tokens than it has vectors for, of which OpenVINO reads others")
    graph = convert(model, with_types=with_types, features=features)
    compiled = compile_graph(ov, graph, "float32")
    pads_left = check(model, compiled, with_types=with_types, features=features, max_tokens=encoder.max_tokens)
    facts = GraphFacts(
        dim=encoder.dim,
        max_tokens=encoder.max_tokens,
        with_types=with_types,
        pad_id=model.tokenizer.pad_token_id or 0,
        pads_left=pads_left,
        unknown=encoder.unknown,
        prompts={name: text or "" for name, text in model.prompts.items()},
        default_prompt_name=model.default_prompt_name,
        fingerprint=dict(encoder.fingerprint()),
        versions=dict(encoder.made_with()["versions"]),
    )
    kept = store_graph(
        key, facts, encoder.fast_tokenizer.to_str(), lambda path: ov.save_model(graph, path, compress_to_fp16=False)
    )
    if kept is None:
        raise ModelError("its OpenVINO graph cannot be kept in the cache folder")
    return kept


def _encoder(graph: CachedGraph, options: EmbedOptions, dtype: str) -> OpenVinoEncoder:
    prompt = resolve_prompt(graph.facts, options.prompt, options.prompt_name)
    if prompt is None:
        raise OptionsError(
            f"the model has no prompt named {options.prompt_name!r}; it has {sorted(graph.facts.prompts)}"
        )
    name = str(options.model) if isinstance(options.model, (str, Path)) else type(options.model).__name__
    return OpenVinoEncoder(graph, name=name, dtype=dtype, prompt=prompt)


def _key_of(encoder: TorchEncoder) -> str:
    facts: list[Any] = ["live", version("openvino"), version("asyncembed"), dict(encoder.fingerprint())]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]
