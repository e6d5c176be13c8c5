"""Products of matrices in 8-bit integers: a checked float32 graph with its scales, calibrated on texts of our own.

Weights have a scale for each output, activations one for each product, found by running `calibration.txt`. A few
channels of a language model's activations are ten times as large as the others, and a scale that holds them leaves the
others few steps; so these are divided by a factor and the weights multiplied by it, as SmoothQuant does (Xiao et al.,
2022). Scales do not depend on the batch, so a text has one vector, whatever it runs with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncembed.cache import write_small
from asyncembed.encoders.base import Tokenizer, padded
from asyncembed.errors import ModelError

MIN_MEAN_COSINE = 0.99
"""What the vectors of texts that it was not calibrated on must agree with those of float32 by, on average."""

_METHOD = "static, smoothed 0.9"
_SMOOTHING = 0.9  # cosines of all-MiniLM-L6-v2: 0.9985 on average, 0.996 at least; 0.9928 and 0.987 without smoothing
_STEPS = 8  # of a factor from one power of two to the next
_LONGEST = 512  # tokens of the longest row that is calibrated on
_CHECKED_EVERY = 4  # of so many texts one is left to the check

Floats = npt.NDArray[np.float32]


def texts() -> list[str]:
    """What is calibrated on, and checked with: short and long texts of several languages, and code."""
    return Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8").splitlines()


def load_int8(
    core: Any, folder: Path, tokenizer: Tokenizer, max_tokens: int, recorded: Mapping[str, str] | None
) -> tuple[Any, Mapping[str, str]]:
    """The graph in a folder in int8, and what of that changes a vector, for the fingerprint.

    Scales that a folder of results records are used again, so that it can be gone on with where the graph was made
    anew; else those that were found when the graph was first used; else they are found now and kept.

    Raises:
        ModelError: Its vectors would be too far from those of float32, or it has nothing to quantise.
    """
    graph = core.read_model(folder / "model.xml")
    calibration = hashlib.sha256("\n".join(texts()).encode()).hexdigest()[:16]
    kept = folder / f"int8-{calibration}.json"
    ours = {"method": _METHOD, "calibration": calibration}
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged
        ours["scales"] = str(json.loads(kept.read_bytes())["scales"])
    for known in (recorded or {}, ours):
        if known.get("method") == _METHOD and "scales" in known:
            with suppress(ValueError, zlib.error):
                if (made := quantized(graph, known["scales"])) is not None:
                    return made, known
    ours["scales"] = calibrate(core, graph, tokenizer, max_tokens)
    made = quantized(graph, ours["scales"])
    check(core, graph, made, tokenizer, max_tokens)
    with suppress(OSError):  # they are found again at the next start
        write_small(kept, json.dumps(ours).encode())
    return made, ours


def calibrate(core: Any, graph: Any, tokenizer: Tokenizer, max_tokens: int) -> str:
    """The scales of a graph, packed: for each product's input its lowest and highest value, and a factor a channel."""
    products = _products(graph)
    if not products:
        raise ModelError("it has no products of weights that could be computed in int8")
    probe = graph.clone()
    n_own = len(probe.outputs)
    by_name = {node.get_friendly_name(): node for node in probe.get_ordered_ops()}
    probe.add_outputs([by_name[name].output(number) for name, number in products])
    compiled = core.compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    low: list[Any] = [0.0] * len(products)
    high: list[Any] = [0.0] * len(products)
    calibrated, _ = _rows(tokenizer, max_tokens)
    for row in calibrated:
        found = compiled(_arrays(row, len(compiled.inputs)))
        for place in range(len(products)):
            values = found[n_own + place].reshape(-1, found[n_own + place].shape[-1])
            low[place] = np.minimum(low[place], values.min(axis=0))
            high[place] = np.maximum(high[place], values.max(axis=0))
    packed = b"".join(
        _pack(low[place], high[place], [weights for _, weights in members])
        for place, members in enumerate(products.values())
    )
    return base64.b64encode(zlib.compress(packed, 9)).decode()


def quantized(graph: Any, scales: str) -> Any | None:
    """The graph with its products in int8; None if the scales are of another graph."""
    from openvino import opset13 as ops

    made = graph.clone()
    packed, at = zlib.decompress(base64.b64decode(scales)), 0
    for members in _products(made).values():
        n_channels = members[0][1].shape[1]
        end = at + 8 + n_channels
        if end > len(packed):
            return None
        low, high = np.frombuffer(packed, "<f4", 2, at)
        factors = np.exp2(np.frombuffer(packed, np.uint8, n_channels, at + 8) / _STEPS).astype(np.float32)
        at = end
        source = ops.multiply(members[0][0].input_value(0), ops.constant(1 / factors))
        steps = _fake_quantize(ops, source, low, high, 256)
        for product, weights in members:
            scaled = weights * factors
            largest = np.maximum(np.abs(scaled).max(axis=1, keepdims=True), 1e-9)
            if not product.get_attributes()["transpose_b"]:
                scaled, largest = np.ascontiguousarray(scaled.T), np.ascontiguousarray(largest.T)
            product.input(0).replace_source_output(steps.output(0))
            levels = _fake_quantize(ops, ops.constant(scaled), -largest, largest, 255)
            product.input(1).replace_source_output(levels.output(0))
    if at != len(packed):
        return None
    made.validate_nodes_and_infer_types()
    return made


def check(core: Any, graph: Any, made: Any, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Refuse a graph whose vectors of texts that it was not calibrated on are far from those of float32."""
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    plain, quick = (core.compile_model(each, "CPU", hint) for each in (graph, made))
    cosines = []
    for row in _rows(tokenizer, max_tokens)[1]:
        a, b = (np.asarray(each(_arrays(row, len(plain.inputs)))[0], np.float64)[0] for each in (plain, quick))
        cosines.append(float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))
    mean = float(np.mean(cosines))
    if not mean >= MIN_MEAN_COSINE:
        raise ModelError(
            f"in int8 its vectors agree with those of float32 by a mean cosine of {mean:.4f} only, less than "
            f"{MIN_MEAN_COSINE}; use --dtype bfloat16 or float32"
        )


def _products(graph: Any) -> dict[tuple[str, int], list[tuple[Any, Floats]]]:
    """The products with constant weights, `(outputs, channels)` float32 each, by what they are multiplied with."""
    found: dict[tuple[str, int], list[tuple[Any, Floats]]] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
            continue
        source, weights = node.input_value(0), node.input_value(1).get_node()
        if weights.get_type_name() != "Constant" or len(weights.shape) != 2 or source.get_node() is weights:
            continue
        matrix = np.asarray(weights.data, np.float32)
        key = (source.get_node().get_friendly_name(), source.get_index())
        found.setdefault(key, []).append((node, matrix if node.get_attributes()["transpose_b"] else matrix.T))
    return found


def _pack(low: Floats, high: Floats, weights: Sequence[Floats]) -> bytes:
    """Lowest and highest value after the division, and how often each channel is halved, in eighths."""
    largest = np.maximum(np.maximum(-low, high), 1e-5)
    of_weights = np.maximum(np.max([np.abs(matrix).max(axis=0) for matrix in weights], axis=0), 1e-5)
    factors = largest**_SMOOTHING / of_weights ** (1 - _SMOOTHING)
    factors /= np.median(factors)
    halved = np.clip(np.rint(np.log2(factors) * _STEPS), 0, 255).astype(np.uint8)  # small channels stay as they are
    factors = np.exp2(halved / _STEPS)
    ends = np.array([(low / factors).min(), (high / factors).max()], "<f4")
    packed: bytes = ends.tobytes() + halved.tobytes()
    return packed


def _fake_quantize(ops: Any, source: Any, low: Any, high: Any, n_levels: int) -> Any:
    ends = [ops.constant(np.asarray(end, np.float32)) for end in (low, high, low, high)]
    return ops.fake_quantize(source, *ends, n_levels)


def _rows(tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Any], list[Any]]:
    """Rows to calibrate on, and rows to check with: texts alone, and several in a row up to the longest."""
    longest = min(max_tokens, _LONGEST)
    alone = texts()
    joined = [" ".join(alone[start : start + 12]) for start in range(0, len(alone), 6)]
    rows: tuple[list[Any], list[Any]] = ([], [])
    for listed in (alone, joined):
        for number, found in enumerate(tokenizer.tokenize(listed)):
            keep = max(found.n_prefix + 1, longest - found.n_suffix)
            ids = np.concatenate((found.ids[:keep], found.ids[len(found.ids) - found.n_suffix :]))
            whole = found.ids if len(found.ids) <= longest else ids
            if found.n_content:
                rows[number % _CHECKED_EVERY == 0].append(whole)
    return rows


def _arrays(row: Any, n_inputs: int) -> list[Any]:
    return padded([row], 0, on_left=False)[:n_inputs]
