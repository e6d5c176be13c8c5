"""What a run needs before its first text: the model, its chunker, their fingerprint, and what the folder records."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from asyncembed.encoders import (
    Encoder,
    check_dim,
    default_chunk_size,
    input_of,
    instruction_of,
    load_encoder,
    tell_chunk_size,
)
from asyncembed.engine.chunking import Chunker, TextSplitter
from asyncembed.errors import OptionsError
from asyncembed.options import EmbedOptions
from asyncembed.store.ledger import Header


def fingerprint_of(header: Header | None) -> Mapping[str, Any]:
    """The fingerprint in a header; nothing where there is none."""
    return header.fingerprint if header is not None else {}


def encoder_for(options: EmbedOptions, loaded: Encoder | None, recorded: Mapping[str, Any]) -> Encoder:
    """The model for a folder: the one that is loaded already, unless the folder records another precision.

    That is taken over where the user left it open; a live model has its own, and keeps it.
    """
    wanted = recorded.get("dtype")
    is_open = isinstance(options.model, (str, os.PathLike)) and options.dtype == "auto"
    if loaded is not None and (not is_open or wanted in (None, loaded.dtype)):
        return loaded
    return load_encoder(options, recorded=recorded)


def load_all(
    options: EmbedOptions,
    splitter: TextSplitter | None,
    recorded: Mapping[str, Any],
    load: Callable[[Mapping[str, Any]], Encoder] | None = None,
) -> tuple[Encoder, Chunker, dict[str, Any]]:
    """The model, its chunker and their fingerprint (empty if nothing is saved). Blocking, takes seconds."""
    encoder = load(recorded) if load is not None else encoder_for(options, None, recorded)
    check_dim(encoder, options)
    chunker = load_chunker(encoder, options, splitter=splitter, recorded=recorded)
    tell_chunk_size(encoder, options, chunker.chunk_size)
    return encoder, chunker, run_fingerprint(encoder, chunker, options) if options.folder is not None else {}


def load_chunker(
    encoder: Encoder,
    options: EmbedOptions,
    *,
    splitter: TextSplitter | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Chunker:
    """A chunker for the model, with a tokenizer of its own."""
    instruction = instruction_of(encoder, options)
    tokenizer, max_tokens = input_of(encoder, instruction.task)

    def chunker(chunk_size: int | None) -> Chunker:
        return Chunker(
            tokenizer,
            max_tokens,
            prompt=instruction.prompt,
            task=instruction.task,
            chunk_size=chunk_size,
            chunk_overlap=options.chunk_overlap,
            long_texts=options.long_texts,
            splitter=splitter,
        )

    size = options.chunk_size or default_chunk_size(encoder, max_tokens)
    adopted: int | None = (recorded or {}).get("chunk_size") if options.chunk_size is None else None
    if adopted is not None and adopted >= chunker(None).chunk_size:
        # Nobody chose it: an earlier version took all that the model states. What fits into a smaller chunk has the
        # same vector. (Or it is another prompt's or model's: the comparison of fingerprints names that.)
        made = chunker(size)
        made.recorded_size = adopted
        return made
    if adopted is not None:
        with suppress(OptionsError):  # an overlap as large: the comparison of fingerprints names it
            return chunker(adopted)
    return chunker(size)


def run_fingerprint(encoder: Encoder, chunker: Chunker, options: EmbedOptions) -> dict[str, Any]:
    """All that changes a vector: compared when a folder is gone on with."""
    return {
        **encoder.fingerprint(),
        **chunker.fingerprint(),
        "prompt": chunker.prompt,
        **({"task": chunker.task} if chunker.task is not None else {}),
        "normalize_embeddings": options.normalize_embeddings,
        "dim": min(encoder.dim, options.truncate_dim or encoder.dim),
    }
