"""Computing a sample of a folder's texts again, with the folder's model and options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from asyncembed.errors import CorruptRecordError, StoreError
from asyncembed.sinks.checking import Fault
from asyncembed.sinks.folder import StorePaths, record_ids, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.origin import is_of
from asyncembed.sinks.reader import open_embeddings
from asyncembed.sinks.record_file import StoredText, read_record


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The model that computes, where it is not the one that the folder names, and what it may load."""

    model: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class Recomputation:
    """Computes texts of a folder again, by torch, so that it needs no graph.

    Attributes:
        n_texts: Texts computed so far.
    """

    def __init__(self, paths: StorePaths, n_wanted: int, choice: ModelChoice) -> None:
        self.n_texts = 0
        self._paths = paths
        self._n_wanted = n_wanted
        self._choice = choice

    def __repr__(self) -> str:
        return f"<Recomputation {self._paths.root!r} n_texts={self.n_texts}>"

    def faults(self) -> Iterator[Fault]:
        """The files of the sample whose vectors are not what the model gives.

        Raises:
            StoreError: Nothing says what the texts were made with.
            StoreMismatchError: The model is another than the folder's.
            ModelError: It cannot be loaded.
        """
        from asyncembed.encoders import Instruction, load_encoder
        from asyncembed.job.loading import load_chunker, run_fingerprint
        from asyncembed.job.lookup import MIN_COSINE, MIN_COSINE_ROUGH, disagreements
        from asyncembed.options import EmbedOptions

        stored = open_embeddings(self._paths.root)
        made, made_with = stored.fingerprint, stored.made_with
        model = self._choice.model or (made_with or {}).get("model")
        if made is None or model is None:
            raise StoreError(f"{self._paths.root}: nothing says what its texts were made with; run a job first")
        options = EmbedOptions(
            model=model,
            backend="torch",
            trust_remote_code=self._choice.trust_remote_code,
            allow_pickle=self._choice.allow_pickle,
            prompt=made.get("prompt"),
            task=made.get("task"),
            normalize_embeddings=made.get("normalize_embeddings", False),
        )
        encoder = load_encoder(options, dtype=made.get("dtype"))
        options = replace(options, truncate_dim=min(encoder.dim, made.get("dim", encoder.dim)))
        chunker = load_chunker(encoder, options)
        ours = run_fingerprint(encoder, chunker, options)
        # How a text was cut into chunks is in its file.
        ours |= {name: made[name] for name in ("chunk_size", "chunk_overlap", "long_texts", "splitter") if name in made}
        Header.of(made, {}).compare(Header.of(ours, {}), self._paths.root)
        least = MIN_COSINE if encoder.dtype == "float32" else MIN_COSINE_ROUGH
        ours_alone = (text for text in self._sample() if is_of(text, Header.of(made, {})))  # of others all is said
        for wrong, cosine in disagreements(encoder, Instruction(chunker.prompt, chunker.task), ours_alone, least):
            yield Fault(
                self._paths.record(wrong.id), f"its vector is not what the model gives (cosine {cosine:.4f})", True
            )

    def _sample(self) -> Iterator[StoredText]:
        """So many stored texts, each with the same chance; damaged ones are passed over."""
        chosen: list[str] = []
        with storage_errors(self._paths.root):
            for number, identity in enumerate(name for block in record_ids(self._paths) for name in block):
                if len(chosen) < self._n_wanted:
                    chosen.append(identity)
                elif (place := random.randrange(number + 1)) < self._n_wanted:
                    chosen[place] = identity
        for identity in chosen:
            try:
                stored = read_record(identity, self._paths.record(identity))
            except (CorruptRecordError, FileNotFoundError):
                continue
            self.n_texts += 1
            yield stored
