"""A model's whole pipeline run by OpenVINO on a CPU, without torch; and how its graph is made of one, and checked."""

from __future__ import annotations

import importlib.util
import locale
import logging
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.base import CHUNK_OF_UNLIMITED, FloatMatrix, Tokenizer, padded
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
from asyncembed.encoders.int8 import load_int8
from asyncembed.encoders.quiet import quiet_conversion
from asyncembed.encoders.tokenizers import FastTokenizer, cuts_left
from asyncembed.errors import ModelError, OptionsError
from asyncembed.options import EmbedOptions
from asyncembed.records import Batch
from asyncembed.wording import first_line

if TYPE_CHECKING:
    from asyncembed.encoders.torch_encoder import TorchEncoder

logger = logging.getLogger("asyncembed")

_BROKEN_STATE = ("shape infer", "broadcast-merge")
"""Said by a stream whose earlier run ended for lack of memory: shapes of that run are left in it."""

KEPT_KERNELS = 100
"""Kernels that each stream keeps; OpenVINO makes them for each shape of a batch. Its own 5,000 hold a quarter of a
megabyte for every shape that an app's batches ever have, so a process grows for hours. With 100 it levels off at what
oneDNN keeps below (1,024 for the process) and is as fast: 3,780 and 3,800 tokens a second of processor over 1,500
batches of 625 shapes."""

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVinoEncoder:
    """Runs a checked graph with as many streams as OpenVINO finds best for throughput.

    On two cores two streams of one thread give 1.2 to 1.6 times the tokens per second of one stream of two threads.
    One batch more than there are streams is under way: OpenVINO begins it the moment a stream is free, without waiting
    for Python, whose threads have their own use for the cores.
    """

    backend = "openvino"
    device = "cpu"

    def __init__(
        self,
        graph: CachedGraph,
        *,
        name: str,
        dtype: str,
        prompt: str,
        quantization: Mapping[str, str] | None = None,
    ) -> None:
        ov = import_openvino()
        self._tensor = ov.Tensor
        self.name = name
        self.dtype = dtype
        self.prompt = prompt
        self.prompts: Mapping[str, str] = graph.facts.prompts
        self._facts = graph.facts
        self.dim = graph.facts.dim
        self.max_tokens = graph.facts.max_tokens
        self.default_chunk_size = CHUNK_OF_UNLIMITED
        self._tokenizer_json = graph.tokenizer_path.read_text(encoding="utf-8")
        self._quantization: Mapping[str, str] | None = None
        source: Any = str(graph.model_path)
        if dtype == "int8":
            source, self._quantization = load_int8(
                ov.Core(), graph.folder, self.tokenizer(), self.max_tokens, quantization
            )
        self._compiled = compile_graph(ov, source, dtype)
        self.slots = 1 + max(1, int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self._idle = deque(self._compiled.create_infer_request() for _ in range(self.slots))
        self._under_way: list[Any] = []
        self._ended_early: dict[int, FloatMatrix | Exception] = {}
        self._ran_out = False
        self._graph = graph
        if graph.is_temporary and sys.platform != "win32":
            shutil.rmtree(
                graph.folder, ignore_errors=True
            )  # the files are read or mapped; to remove them later may fall to an event loop
        self._inputs: dict[int, list[Any]] = {}  # last: when all goes, the requests that read these go before them

    def __repr__(self) -> str:
        return f"<OpenVinoEncoder {self.name!r} {self.dtype} dim={self.dim} slots={self.slots}>"

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of the caller's own."""
        bare = RustTokenizer.from_str(self._tokenizer_json)
        return FastTokenizer(bare, self._facts.unknown, cuts_left=self._facts.cuts_left)

    def start(self, batch: Batch) -> Any:
        """Put a batch under way in an idle request."""
        request = self._idle.popleft()
        try:
            self._begin(request, self._rows(batch))
        except BaseException:
            self._idle.append(request)
            raise
        self._under_way.append(request)
        return request

    def finish(self, handle: Any) -> FloatMatrix:
        """Wait for a batch: shape `(rows, dim)` float32."""
        request = handle
        ended = self._ended_early.pop(id(request), None)
        if ended is None:
            ended = self._end(request)
        self._under_way.remove(request)
        self._idle.append(request)
        self._inputs.pop(id(request), None)
        if isinstance(ended, Exception):
            raise ended
        return ended

    def free_memory(self) -> None:
        """Give buffers back, and bring the streams to rights: a run that ended for lack of memory leaves shapes behind.

        Batches under way are waited for; `finish` then gives what became of them.
        """
        self._ran_out = True
        for request in self._under_way:
            if id(request) not in self._ended_early:
                self._ended_early[id(request)] = self._end(request)
        self._compiled.release_memory()
        blank = self._blank()
        for _ in range(2):  # the first run of a stream may still fail for the last one's sake
            for request in self._idle:
                with suppress(RuntimeError, MemoryError):
                    self._begin(request, blank)
            for request in self._idle:
                with suppress(RuntimeError, MemoryError):
                    request.wait()

    def fingerprint(self) -> Mapping[str, Any]:
        """That of the torch model, with this precision."""
        quantization = {} if self._quantization is None else {"quantization": dict(self._quantization)}
        return {**self._facts.fingerprint, "dtype": self.dtype, **quantization}

    def made_with(self) -> Mapping[str, Any]:
        """Model, device and versions."""
        versions = {**self._facts.versions, "openvino": version("openvino")}
        return {"model": self.name, "device": self.device, "backend": self.backend, "versions": versions}

    def _begin(self, request: Any, arrays: list[Any]) -> None:
        """Start a request on arrays without copying them; they are kept until it has ended, whoever waits for it."""
        self._inputs[id(request)] = arrays
        for place, array in enumerate(arrays):
            request.set_input_tensor(place, self._tensor(array, shared_memory=True))
        request.start_async()

    def _end(self, request: Any) -> FloatMatrix | Exception:
        """Wait for a request: its vectors, or what it failed of."""
        try:
            request.wait()
            matrix: FloatMatrix = np.array(request.get_output_tensor(0).data[:, : self.dim], np.float32)
        except Exception as error:
            said = str(error).lower()
            if self._ran_out and any(phrase in said for phrase in _BROKEN_STATE):
                return MemoryError("an earlier batch that ran out of memory left the model in disorder")
            return error.with_traceback(None)
        return matrix

    def _blank(self) -> list[Any]:
        """The smallest batch there is: a row of one padding token."""
        return padded([[self._facts.pad_id]], 0, on_left=False)[: 3 if self._facts.with_types else 2]

    def _rows(self, batch: Batch) -> list[Any]:
        arrays = padded([chunk.ids for chunk in batch.chunks], self._facts.pad_id, on_left=self._facts.pads_left)
        return arrays if self._facts.with_types else arrays[:2]


def import_openvino() -> Any:
    """The package `openvino`, told that its telemetry is not installed: it would report the import and conversions.

    A program that has imported `openvino` or `openvino_telemetry` itself keeps what it has.
    """
    added = "openvino_telemetry" not in sys.modules
    if added:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # means: cannot be imported
    try:
        import openvino
    finally:
        if added:
            sys.modules.pop("openvino_telemetry", None)
    return openvino


def compile_graph(ov: Any, source: Any, dtype: str) -> Any:
    """Compile a graph, or a saved one by its path, for throughput on this CPU."""
    if dtype == "int8":  # what is not multiplied in int8
        dtype = "bfloat16" if "bfloat16" in supported_dtypes() else "float32"
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        "CPU_RUNTIME_CACHE_CAPACITY": str(KEPT_KERNELS),
    }
    return ov.Core().compile_model(source, "CPU", settings)


def supported_dtypes() -> set[str]:
    """Precisions in which this CPU's OpenVINO plugin computes natively."""
    ov = import_openvino()
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"FP32": "float32", "BF16": "bfloat16", "FP16": "float16", "INT8": "int8"}
    return {names[found] for found in capabilities if found in names}


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
    rows = [contents[row, : max(2, length - row * length // (n_rows + 1))] for row in range(n_rows)]
    return padded(rows, encoder.pad_id, on_left=pads_left)


def _cosines(a: FloatMatrix, b: FloatMatrix) -> Any:
    with np.errstate(all="ignore"):  # whatever the program around has chosen
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.sum(a * b, axis=1) / np.where(lengths > 0, lengths, np.inf)


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def load_cached(
    key: str, options: EmbedOptions, dtype: str, quantization: Mapping[str, str] | None = None
) -> OpenVinoEncoder | None:
    """The encoder from the cache, without torch; None if its graph was not made yet."""
    if (reason := known_failure(key)) is not None:
        raise ModelError(reason)
    graph = load_graph(key)
    return _encoder(graph, options, dtype, quantization) if graph is not None else None


def convert_and_keep(
    encoder: TorchEncoder,
    folder: Path | None,
    key: str | None,
    options: EmbedOptions,
    dtype: str,
    quantization: Mapping[str, str] | None = None,
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
    return _encoder(graph, options, dtype, quantization)


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


def _encoder(
    graph: CachedGraph, options: EmbedOptions, dtype: str, quantization: Mapping[str, str] | None
) -> OpenVinoEncoder:
    prompt = resolve_prompt(graph.facts, options.prompt, options.prompt_name)
    if prompt is None:
        raise OptionsError(
            f"the model has no prompt named {options.prompt_name!r}; it has {sorted(graph.facts.prompts)}"
        )
    name = str(options.model) if isinstance(options.model, (str, Path)) else type(options.model).__name__
    return OpenVinoEncoder(graph, name=name, dtype=dtype, prompt=prompt, quantization=quantization)
