"""A SentenceTransformer's whole pipeline as an OpenVINO graph, checked against torch before it is trusted."""

from __future__ import annotations

import locale
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncembed.encoders.base import FloatMatrix
from asyncembed.encoders.quiet import quiet_conversion
from asyncembed.errors import ModelError

if TYPE_CHECKING:
    from asyncembed.encoders.torch_encoder import TorchEncoder

MIN_COSINE = 0.99999
"""The graph's float32 vectors must agree with torch's by this much on every probe row."""

_LENGTHS = (3, 5, 17, 64, 256)
_LONGEST = 2048  # the longest probe: a larger one could itself exhaust the memory
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def convert(encoder: TorchEncoder, *, with_types: bool, features: dict[str, Any]) -> Any:
    """The graph of transformer, pooling and all that follows, as an `openvino.Model`.

    Raises:
        Exception: Whatever the conversion raises: the caller falls back on torch.
    """
    import torch

    from asyncembed.encoders.openvino_encoder import import_openvino

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
    """Write `path`, the graph's XML, and its weights beside it.

    Raises:
        OSError: They cannot be written.
    """
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

    Raises:
        ModelError: They do not agree; the message says by how much.
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
