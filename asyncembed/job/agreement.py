"""Whether stored vectors are what the model gives: a fingerprint tells of weights and options, not of what ran them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from asyncembed.encoders import Encoder, Instruction, Tokenizer, input_of
from asyncembed.errors import StoreMismatchError
from asyncembed.records import Batch, Chunk, EmbeddedChunk, FloatVector
from asyncembed.sinks.record_file import StoredText

MIN_COSINE = 0.9999
"""What a vector and the same computed again must agree by in float32."""

MIN_COSINE_ROUGH = 0.99
"""The same in a lower precision, and for a job that looks at a few texts before it goes on with a folder."""

LOOKED_AT = 3
"""Stored texts that are computed again before a job goes on with their folder."""

LARGEST_LOOKED_AT = 256
"""Tokens of the largest chunk that is computed again so: it runs alone, outside the limits of a job's batches."""

RUN_BY_US = ("torch", "openvino")
"""Backends whose vectors must agree; what an encoder of the user's own promises, we do not know."""


def disagreements(
    encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText], least: float
) -> Iterator[tuple[StoredText, float]]:
    """The texts of which a chunk has another vector than the model gives, each with its lowest cosine.

    One chunk is computed at a time, in the thread that calls. Chunks that the model no longer takes are passed over.
    """
    tokenizer, max_tokens = input_of(encoder, instruction.task)
    probe, bare = tokenizer.tokenize([instruction.prompt + "a", "a"])
    n_prompt = probe.n_content - bare.n_content  # as the chunker counts them
    for stored in texts:
        lowest = 1.0
        for chunk in stored.chunks:
            row = _row_of(tokenizer, instruction, n_prompt, chunk)
            if row is not None and row.length <= max_tokens:
                lowest = min(lowest, _cosine(encoder.finish(encoder.start(Batch((row,))))[0], chunk.embedding))
        if not lowest >= least:
            yield stored, lowest


def _row_of(tokenizer: Tokenizer, instruction: Instruction, n_prompt: int, chunk: EmbeddedChunk) -> Chunk | None:
    """What was computed of a stored chunk: the first `n_tokens` tokens of its text, as it may have been truncated.

    None if its text has fewer: it was tokenised otherwise.
    """
    found = tokenizer.tokenize([instruction.prompt + chunk.text])[0]
    n_dropped = found.n_content - n_prompt - chunk.n_tokens
    if n_dropped < 0:
        return None
    end = len(found.ids) - found.n_suffix
    ids = np.concatenate((found.ids[: end - n_dropped], found.ids[end:]))
    how = (instruction.prompt, instruction.task, n_dropped > 0)
    return Chunk(0, 0, chunk.text, 0, ids, chunk.n_tokens, 0, *how)


def check_folder(folder: str, encoder: Encoder, instruction: Instruction, texts: Iterable[StoredText]) -> None:
    """Refuse to go on with a folder whose vectors are not the model's, judging by the first chunk of a few texts.

    Raises:
        StoreMismatchError: One of them is another.
    """
    heads = (replace(stored, chunks=stored.chunks[:1]) for stored in texts)
    small = (stored for stored in heads if all(chunk.n_tokens <= LARGEST_LOOKED_AT for chunk in stored.chunks))
    try:
        wrong = next(disagreements(encoder, instruction, small, MIN_COSINE_ROUGH), None)
    except Exception:  # the job will meet that as well, and knows what to do
        return
    if wrong is not None:
        stored, cosine = wrong
        raise StoreMismatchError(
            f"{folder}: the vector it holds of {stored.text[:40]!r} is not what the model gives (cosine "
            f"{cosine:.4f}); asyncembed-store verify --recompute N --remove-damaged looks at N of its texts and "
            "removes such files; or choose another save path, or overwrite"
        )


def _cosine(computed: FloatVector, stored: FloatVector) -> float:
    a, b = computed[: len(stored)].astype(np.float64), stored.astype(np.float64)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else 0.0
