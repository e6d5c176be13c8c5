"""Finds a checked OpenVINO graph for a model, or converts the torch model and checks what comes out."""

from __future__ import annotations

import importlib.util
import locale
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncembed.encoders.base import FloatMatrix
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
from asyncembed.encoders.quiet import quiet_conversion
from asyncembed.encoders.tokenizers import cuts_left
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import EmbedOptions
from asyncembed.wording import first_line

if TYPE_CHECKING:
    from asyncembed.encoders.torch_encoder import TorchEncoder

MIN_COSINE = 0.99999
"""The graph's float32 vectors must agree with torch's by this much on every probe row."""

_LENGTHS = (3, 5, 17, 64, 256)
_LONGEST = 2048  # the longest probe: a larger one could itself exhaust the memory
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def convert(encoder: TorchEncoder, *, with_types: bool, features: dict[str, Any]) -> Any:
    """The graph of transformer, pooling and all that follows, as an `openvino.Model`."""
    import torch

    ov = import_openvino()

    class Pipeline(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = encoder.model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            given = {**features, "input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                given["token_type_ids"] = token_type_ids
            return self.model(given)["sentence_embedding"]

    ids, mask, types = (torch.from_numpy(array) for array in _probe_rows(encoder, 7, 3, encoder.pads_left))
    example = (ids, mask, types) if with_types else (ids, mask)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), quiet_conversion():
        graph = ov.convert_model(Pipeline(), example_input=example)
    for number, name in enumerate(_INPUTS[: len(example)]):
        graph.inputs[number].get_node().set_friendly_name(name)
        graph.inputs[number].get_tensor().set_names({name})
    return graph


def save(graph: Any, path: Path) -> None:
    """Write `path`, the graph's XML, and its weights beside it."""
    import openvino as ov

    try:
        with _decimal_points():
            ov.save_model(graph, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"{path.parent}: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def _decimal_points() -> Iterator[None]:
    """Numbers are written with a point by this thread, whatever locale the program has set.

    OpenVINO writes some numbers as the C library does, so under a locale with a decimal comma it writes files that it
    reads back as other numbers. The locale of the process is left alone: other threads depend on it. Where a thread
    cannot have its own (Windows), the check of what was saved finds out.
    """
    import ctypes

    libc: Any = None if sys.platform == "win32" else ctypes.CDLL(None)
    if not hasattr(libc, "uselocale"):
        yield
        return
    for name, arguments in (
        ("duplocale", [ctypes.c_void_p]),
        ("newlocale", [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]),
        ("uselocale", [ctypes.c_void_p]),
        ("freelocale", [ctypes.c_void_p]),
    ):
        function = getattr(libc, name)
        function.argtypes, function.restype = arguments, ctypes.c_void_p
    before = libc.uselocale(None)
    plain = libc.newlocale(1 << locale.LC_NUMERIC, b"C", libc.duplocale(before))
    libc.uselocale(plain)
    try:
        yield
    finally:
        libc.uselocale(before)
        libc.freelocale(plain)


def check(encoder: TorchEncoder, compiled: Any, *, with_types: bool, features: dict[str, Any]) -> bool:
    """Compare the compiled graph with torch on rows of several lengths up to the longest, with and without padding.

    Torch pads on the encoder's side. A decoder padded on the left has positions that attend to nothing, of which
    OpenVINO makes NaN; if the graph fails so, it is tried with padding on the right, which causal attention ignores.

    Returns:
        Whether the graph's rows are to be padded on the left.
    """
    request = compiled.create_infer_request()
    reasons: list[str] = []
    for pads_left in dict.fromkeys((encoder.pads_left, False)):
        reason = _disagreement(encoder, request, pads_left, with_types, features)
        if reason is None:
            return pads_left
        reasons.append(reason)
    raise ModelError(f"its OpenVINO graph does not agree with torch: {reasons[0]}")


def _disagreement(
    encoder: TorchEncoder, request: Any, pads_left: bool, with_types: bool, features: dict[str, Any]
) -> str | None:
    """Where graph and torch differ; None if nowhere."""
    import torch

    max_tokens = encoder.max_tokens
    for length in sorted({*(min(length, max_tokens) for length in _LENGTHS), min(max_tokens, _LONGEST)}):
        for n_rows in (1, 4) if length <= _LENGTHS[-1] else (1,):
            arrays = _probe_rows(encoder, length, n_rows, encoder.pads_left)
            given = {name: torch.from_numpy(array) for name, array in zip(_INPUTS, arrays, strict=True)}
            if not with_types:
                del given["token_type_ids"]
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                expected = encoder.model({**features, **given})["sentence_embedding"].float().numpy()
            request.infer(list(_probe_rows(encoder, length, n_rows, pads_left)[: 3 if with_types else 2]))
            found = request.get_output_tensor(0).data.copy()
            worst = float(_cosines(found, expected).min()) if found.shape == expected.shape else 0.0
            if not worst >= MIN_COSINE:
                return f"cosine {worst:.6f} on {n_rows} rows of {length}"
    return None


def _probe_rows(encoder: TorchEncoder, length: int, n_rows: int, pads_left: bool) -> Sequence[Any]:
    """Ids, mask and types of rows that get shorter; int64. The same contents on either side of the padding."""
    rng = np.random.default_rng(length)
    size = min(int(getattr(encoder.model.tokenizer, "vocab_size", 1000) or 1000), 20_000)
    contents = rng.integers(min(size - 1, size // 20), size, (n_rows, length), dtype=np.int64)
    ids = np.full((n_rows, length), encoder.pad_id, np.int64)
    mask = np.zeros((n_rows, length), np.int64)
    for row in range(n_rows):
        n_tokens = max(2, length - row * length // (n_rows + 1))
        place = slice(length - n_tokens, length) if pads_left else slice(0, n_tokens)
        ids[row, place] = contents[row, :n_tokens]
        mask[row, place] = 1
    return ids, mask, np.zeros_like(ids)


def _cosines(a: FloatMatrix, b: FloatMatrix) -> Any:
    with np.errstate(all="ignore"):  # whatever the program around has chosen
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.sum(a * b, axis=1) / np.where(lengths > 0, lengths, np.inf)


logger = logging.getLogger("asyncembed")


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def load_cached(key: str, options: EmbedOptions, dtype: str) -> OpenVinoEncoder | None:
    """The encoder from the cache, without torch; None if its graph was not made yet."""
    if (reason := known_failure(key)) is not None:
        raise ModelError(reason)
    graph = load_graph(key)
    return _encoder(graph, options, dtype) if graph is not None else None


def convert_and_keep(
    encoder: TorchEncoder, folder: Path | None, key: str | None, options: EmbedOptions, dtype: str
) -> OpenVinoEncoder:
    """Convert a torch encoder, in float32 on the CPU, check the graph, and keep it."""
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
