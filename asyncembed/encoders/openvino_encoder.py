"""A model's whole pipeline run by OpenVINO on a CPU: no torch, no sentence-transformers."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.base import CHUNK_OF_UNLIMITED, FloatMatrix, Tokenizer
from asyncembed.encoders.graph_cache import CachedGraph
from asyncembed.encoders.tokenizers import FastTokenizer
from asyncembed.records import Batch

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

    def __init__(self, graph: CachedGraph, *, name: str, dtype: str, prompt: str) -> None:
        ov = import_openvino()
        release = weakref.finalize(self, graph.release)
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
        self._compiled = compile_graph(ov, str(graph.model_path), dtype)
        self.slots = 1 + max(1, int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self._idle = deque(self._compiled.create_infer_request() for _ in range(self.slots))
        self._under_way: list[Any] = []
        self._ended_early: dict[int, FloatMatrix | Exception] = {}
        self._ran_out = False
        if graph.is_temporary and sys.platform != "win32":
            release()  # the files are read or mapped; to remove them later may fall to an event loop
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
        return {**self._facts.fingerprint, "dtype": self.dtype}

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
        ids, mask = np.full((1, 1), self._facts.pad_id, np.int64), np.ones((1, 1), np.int64)
        return [ids, mask, np.zeros_like(ids)] if self._facts.with_types else [ids, mask]

    def _rows(self, batch: Batch) -> list[Any]:
        longest, n_rows = batch.longest, len(batch.chunks)
        ids = np.full((n_rows, longest), self._facts.pad_id, np.int64)
        mask = np.zeros((n_rows, longest), np.int64)
        for row, chunk in enumerate(batch.chunks):
            start = longest - chunk.length if self._facts.pads_left else 0
            ids[row, start : start + chunk.length] = chunk.ids
            mask[row, start : start + chunk.length] = 1
        return [ids, mask, np.zeros_like(ids)] if self._facts.with_types else [ids, mask]


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


def compile_graph(ov: Any, path: str, dtype: str) -> Any:
    """Compile a saved graph for throughput on this CPU."""
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        "CPU_RUNTIME_CACHE_CAPACITY": str(KEPT_KERNELS),
    }
    return ov.Core().compile_model(path, "CPU", settings)


def supported_dtypes() -> set[str]:
    """Precisions in which this CPU's OpenVINO plugin computes natively."""
    ov = import_openvino()
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"FP32": "float32", "BF16": "bfloat16", "FP16": "float16"}
    return {names[found] for found in capabilities if found in names}
