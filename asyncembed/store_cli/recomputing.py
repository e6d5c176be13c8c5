"""Computing a sample of a folder's texts again, with the folder's model and options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.sinks.checking import Fault
from asyncembed.sinks.folder import StorePaths, record_ids, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.reader import open_embeddings
from asyncembed.sinks.record_file import StoredText, read_record


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The model that computes, where it is not the one that the folder names, and what it may load."""

    model: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def wrong_vectors(paths: StorePaths, n_texts: int, choice: ModelChoice) -> Iterator[Fault]:
    """The files of a sample whose vectors are not what the model gives. Run by torch, so that it needs no graph.

    Raises:
        StoreError: Nothing says what the texts were made with.
        StoreMismatchError: The model is another than the folder's.
        ModelError: It cannot be loaded.
    """
    from asyncembed.encoders import load_encoder
    from asyncembed.job.agreement import MIN_COSINE, MIN_COSINE_ROUGH, disagreements
    from asyncembed.job.loading import load_chunker, run_fingerprint
    from asyncembed.options import EmbedOptions

    stored = open_embeddings(paths.root)
    made, made_with = stored.fingerprint, stored.made_with
    model = choice.model or (made_with or {}).get("model")
    if made is None or model is None:
        raise StoreError(f"{paths.root}: nothing says what its texts were made with; run a job, or rebuild it, first")
    options = EmbedOptions(
        model=model,
        backend="torch",
        trust_remote_code=choice.trust_remote_code,
        allow_pickle=choice.allow_pickle,
        prompt=made.get("prompt"),
        normalize_embeddings=made.get("normalize_embeddings", False),
    )
    encoder = load_encoder(options, dtype=made.get("dtype"))
    options = replace(options, truncate_dim=min(encoder.dim, made.get("dim", encoder.dim)))
    ours = run_fingerprint(encoder, load_chunker(encoder, options), options)
    # How a text was cut into chunks is in its file.
    ours |= {name: made[name] for name in ("chunk_size", "chunk_overlap", "long_texts", "splitter") if name in made}
    Header.of(made, {}).compare(Header.of(ours, {}), paths.root)
    least = MIN_COSINE if encoder.dtype == "float32" else MIN_COSINE_ROUGH
    for wrong, cosine in disagreements(encoder, options.prompt or "", _sample(paths, n_texts), least):
        yield Fault(paths.record(wrong.id), f"its vector is not what the model gives (cosine {cosine:.4f})", True)


def _sample(paths: StorePaths, n_texts: int) -> Iterator[StoredText]:
    """So many stored texts, each with the same chance; damaged ones are passed over."""
    chosen: list[str] = []
    with storage_errors(paths.root):
        for number, identity in enumerate(identity for block in record_ids(paths) for identity in block):
            if len(chosen) < n_texts:
                chosen.append(identity)
            elif (place := random.randrange(number + 1)) < n_texts:
                chosen[place] = identity
    for identity in chosen:
        try:
            yield read_record(identity, paths.record(identity))
        except (CorruptRecordError, FileNotFoundError):
            continue
