"""Find a checked OpenVINO graph for a model, or make one from the torch model."""

from __future__ import annotations

import importlib.util
import locale
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from asyncembed.encoders.failures import FailureKind, classify
from asyncembed.encoders.graph_cache import (
    CachedGraph,
    GraphFacts,
    forget_failure,
    graph_key,
    keep_graph,
    known_failure,
    load_graph,
    remember_failure,
    resolve_prompt,
)
from asyncembed.encoders.openvino_encoder import OpenVinoEncoder, compile_graph, import_openvino, supported_dtypes
from asyncembed.encoders.tokenizers import cuts_left
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import EmbedOptions
from asyncembed.wording import first_line

if TYPE_CHECKING:
    from asyncembed.encoders.torch_encoder import TorchEncoder

logger = logging.getLogger("asyncembed")


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def load_cached(key: str, options: EmbedOptions, dtype: str) -> OpenVinoEncoder | None:
    """The encoder from the cache, without torch; None if its graph was not made yet.

    Raises:
        ModelError: It could not be made before, for the reason given.
        OptionsError: The model has no prompt of that name.
    """
    if (reason := known_failure(key)) is not None:
        raise ModelError(reason)
    graph = load_graph(key)
    return _encoder(graph, options, dtype) if graph is not None else None


def convert_and_keep(
    encoder: TorchEncoder, folder: Path | None, key: str | None, options: EmbedOptions, dtype: str
) -> OpenVinoEncoder:
    """Convert a torch encoder, in float32 on the CPU, check the graph, and keep it.

    Raises:
        ModelError: It does not convert or does not agree; remembered, so that the next start does not try again. Or
            there was no memory or disk for it, which is not.
    """
    if folder is not None and graph_key(folder) != key:
        key = None  # its files changed while they were read: which of them this model is made of, nobody knows
    try:
        graph = _make(encoder, folder, key)
    except Exception as error:
        reason = first_line(error)
        message = reason if isinstance(error, ModelError) else f"it does not convert: {type(error).__name__}: {reason}"
        if not _may_pass(error):
            if key is not None:
                remember_failure(key, message)
        else:
            logger.warning("%s is not run by OpenVINO this time: %s", encoder.name, message)
        raise ModelError(message) from error
    logger.info("%s is run by OpenVINO; its graph is in %s", encoder.name, graph.folder)
    if key is not None:
        forget_failure(key)
    return _encoder(graph, options, dtype)


def _may_pass(error: Exception) -> bool:
    """Whether a conversion failed for what may be otherwise at the next start: memory, disk, the program's locale."""
    is_passing = isinstance(error, OSError) or classify(error) is not FailureKind.OTHER
    return is_passing or locale.localeconv()["decimal_point"] != "."


def check_dtype(dtype: str) -> str | None:
    """Why this CPU cannot compute in a precision; None if it can."""
    if dtype in supported_dtypes():
        return None
    return f"this processor does not compute in {dtype}"


def _make(encoder: TorchEncoder, folder: Path | None, key: str | None) -> CachedGraph:
    from asyncembed.encoders.graph import check, convert, save

    ov = import_openvino()
    plain = encoder.plain_features()
    if plain is None or encoder.fast_tokenizer is None:
        raise ModelError("it takes more than token ids and a mask")
    features, with_types = plain
    model = encoder.model
    if encoder.fast_tokenizer.get_vocab_size() > model.transformers_model.get_input_embeddings().num_embeddings:
        raise ModelError("its tokenizer has more tokens than it has vectors for, of which OpenVINO reads others")
    graph = convert(encoder, with_types=with_types, features=features)

    def save_and_check(path: Path) -> GraphFacts:
        """What is checked is what later starts read: the file."""
        save(graph, path)
        compiled = compile_graph(ov, str(path), "float32")
        pads_left = check(encoder, compiled, with_types=with_types, features=features)
        return GraphFacts(
            dim=encoder.dim,
            max_tokens=encoder.max_tokens,
            with_types=with_types,
            pad_id=encoder.pad_id,
            pads_left=pads_left,
            unknown=encoder.unknown,
            cuts_left=cuts_left(model.tokenizer),
            prompts={name: text or "" for name, text in model.prompts.items()},
            default_prompt_name=model.default_prompt_name,
            fingerprint=dict(encoder.fingerprint()),
            versions=dict(encoder.made_with()["versions"]),
        )

    return keep_graph(key, folder, encoder.fast_tokenizer.to_str(), save_and_check)


def _encoder(graph: CachedGraph, options: EmbedOptions, dtype: str) -> OpenVinoEncoder:
    prompt = resolve_prompt(graph.facts, options.prompt, options.prompt_name)
    if prompt is None:
        graph.release()
        raise OptionsError(
            f"the model has no prompt named {options.prompt_name!r}; it has {sorted(graph.facts.prompts)}"
        )
    name = str(options.model) if isinstance(options.model, (str, Path)) else type(options.model).__name__
    return OpenVinoEncoder(graph, name=name, dtype=dtype, prompt=prompt)
