"""Whether stored vectors are what the model gives: a fingerprint tells of weights and options, not of what ran them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from asyncembed.encoders import Encoder, Instruction, Tokenizer, input_of
from asyncembed.errors import StoreMismatchError
from asyncembed.records import Batch, Chunk, FloatVector, TokenIds
from asyncembed.sinks.record_file import StoredText

MIN_COSINE = 0.9999
"""What a vector and the same computed again must agree by in float32."""

MIN_COSINE_ROUGH = 0.99
"""The same in a lower precision, and for a job that looks at a few texts before it goes on with a folder."""

LOOKED_AT = 3
"""Stored texts that are computed again before a job goes on with their folder."""

RUN_BY_US = ("torch", "openvino")
"""Backends whose vectors must agree; what an encoder of the user's own promises, we do not know."""


def disagreements(
    encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText], least: float
) -> Iterator[tuple[StoredText, float]]:
    """The texts of which a chunk has another vector than the model gives, each with its lowest cosine.

    One chunk is computed at a time, in the thread that calls. Chunks that the model no longer takes are passed over.
    """
    tokenizer, max_tokens = input_of(encoder, instruction.task)
    for stored in texts:
        lowest = 1.0
        for chunk in stored.chunks:
            ids = _ids_of(tokenizer, instruction.prompt, chunk.text, chunk.n_tokens)
            if ids is None or len(ids) > max_tokens:
                continue
            row = Chunk(0, 0, chunk.text, 0, ids, chunk.n_tokens, 0, instruction.prompt, instruction.task)
            lowest = min(lowest, _cosine(encoder.finish(encoder.start(Batch((row,))))[0], chunk.embedding))
        if not lowest >= least:
            yield stored, lowest


def _ids_of(tokenizer: Tokenizer, prompt: str, text: str, n_tokens: int) -> TokenIds | None:
    """Token ids of a chunk: the first `n_tokens` of its text, which may have been truncated; None if it has fewer."""
    found, bare = tokenizer.tokenize([prompt + text, text])
    n_dropped = bare.n_content - n_tokens
    if n_dropped <= 0:
        return found.ids if n_dropped == 0 else None
    end = len(found.ids) - found.n_suffix
    return np.concatenate((found.ids[: end - n_dropped], found.ids[end:]))


def check_folder(folder: str, encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText]) -> None:
    """Refuse to go on with a folder whose vectors are not the model's, judging by the first chunk of a few texts.

    Raises:
        StoreMismatchError: One of them is another.
    """
    heads = (replace(stored, chunks=stored.chunks[:1]) for stored in texts)
    with suppress(RuntimeError, MemoryError):  # the job will meet that as well, and knows what to do
        for stored, cosine in disagreements(encoder, instruction, heads, MIN_COSINE_ROUGH):
            raise StoreMismatchError(
                f"{folder}: the vector it holds of {stored.text[:40]!r} is not what the model gives (cosine "
                f"{cosine:.4f}); asyncembed-store verify --recompute N --remove-damaged looks at N of its texts and "
                "removes such files; or choose another save path, or overwrite"
            )


def _cosine(computed: FloatVector, stored: FloatVector) -> float:
    a, b = computed[: len(stored)].astype(np.float64), stored.astype(np.float64)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else 0.0
