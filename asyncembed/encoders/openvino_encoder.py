"""A model's whole pipeline run by OpenVINO on a CPU: no torch, no sentence-transformers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from asyncembed.encoders.base import FloatMatrix, Tokenizer
from asyncembed.encoders.graph_cache import CachedGraph
from asyncembed.encoders.tokenizers import FastTokenizer
from asyncembed.records import Batch

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVinoEncoder:
    """Runs a checked graph with as many streams as OpenVINO finds best for throughput.

    On two cores two streams of one thread give 1.2 to 1.6 times the tokens per second of one stream of two threads.
    One batch more than there are streams is under way: OpenVINO begins it the moment a stream is free, without waiting
    for Python, whose threads have their own use for the cores.

    Args:
        graph: The graph, from the cache.
        name: What the user called the model.
        dtype: `float32`, `bfloat16` or `float16`: the precision of the arithmetic; vectors are float32.
        prompt: Put before every chunk.
    """

    backend = "openvino"
    device = "cpu"

    def __init__(self, graph: CachedGraph, *, name: str, dtype: str, prompt: str) -> None:
        import openvino as ov

        self.name = name
        self.dtype = dtype
        self.prompt = prompt
        self.prompts: Mapping[str, str] = graph.facts.prompts
        self._facts = graph.facts
        self.dim = graph.facts.dim
        self.max_tokens = graph.facts.max_tokens
        self._tokenizer_json = graph.tokenizer_path.read_text(encoding="utf-8")
        compiled = compile_graph(ov, str(graph.model_path), dtype)
        self.slots = 1 + max(1, int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
        self._idle = deque(compiled.create_infer_request() for _ in range(self.slots))

    def __repr__(self) -> str:
        return f"<OpenVinoEncoder {self.name!r} {self.dtype} dim={self.dim} slots={self.slots}>"

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of the caller's own."""
        return FastTokenizer(RustTokenizer.from_str(self._tokenizer_json), self._facts.unknown)

    def start(self, batch: Batch) -> Any:
        """Put a batch under way in an idle request."""
        request = self._idle.popleft()
        try:
            arrays = self._rows(batch)
            request.start_async(arrays)
        except BaseException:
            self._idle.append(request)
            raise
        return request, arrays  # the arrays must outlive the request's run

    def finish(self, handle: Any) -> FloatMatrix:
        """Wait for a batch: shape `(rows, dim)` float32."""
        request, _ = handle
        try:
            request.wait()
            matrix: FloatMatrix = np.array(request.get_output_tensor(0).data[:, : self.dim], np.float32)
        finally:
            self._idle.append(request)
        return matrix

    def free_memory(self) -> None:
        """Nothing is kept between batches that could be given back."""

    def fingerprint(self) -> Mapping[str, Any]:
        """That of the torch model, with this precision."""
        return {**self._facts.fingerprint, "dtype": self.dtype}

    def made_with(self) -> Mapping[str, Any]:
        """Model, device and versions."""
        versions = {**self._facts.versions, "openvino": version("openvino")}
        return {"model": self.name, "device": self.device, "backend": self.backend, "versions": versions}

    def _rows(self, batch: Batch) -> list[Any]:
        longest, n_rows = batch.longest, len(batch.chunks)
        ids = np.full((n_rows, longest), self._facts.pad_id, np.int64)
        mask = np.zeros((n_rows, longest), np.int64)
        for row, chunk in enumerate(batch.chunks):
            start = longest - chunk.length if self._facts.pads_left else 0
            ids[row, start : start + chunk.length] = chunk.ids
            mask[row, start : start + chunk.length] = 1
        return [ids, mask, np.zeros_like(ids)] if self._facts.with_types else [ids, mask]


def compile_graph(ov: Any, model: Any, dtype: str) -> Any:
    """Compile a graph (a path or an `openvino.Model`) for throughput on this CPU."""
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": _HINTS[dtype]}
    return ov.Core().compile_model(model, "CPU", settings)


def supported_dtypes() -> set[str]:
    """Precisions in which this CPU's OpenVINO plugin computes natively."""
    import openvino as ov

    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = {"FP32": "float32", "BF16": "bfloat16", "FP16": "float16"}
    return {names[found] for found in capabilities if found in names}
