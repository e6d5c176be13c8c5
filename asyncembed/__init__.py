"""asyncembed: streams of texts in, one embedding per text out, resumable and bounded in memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncembed.embedder import AsyncEmbedder as AsyncEmbedder
    from asyncembed.embedder import CountedVectors as CountedVectors
    from asyncembed.embedder import EmbedderStatistics as EmbedderStatistics
    from asyncembed.encoders import Encoder as Encoder
    from asyncembed.encoders import load_encoder as load_encoder
    from asyncembed.engine.limits import TokenLimitEstimator as TokenLimitEstimator
    from asyncembed.errors import AsyncEmbedError as AsyncEmbedError
    from asyncembed.errors import ClosedError as ClosedError
    from asyncembed.errors import CorruptRecordError as CorruptRecordError
    from asyncembed.errors import DeadlineError as DeadlineError
    from asyncembed.errors import ModelError as ModelError
    from asyncembed.errors import ModelOutOfMemoryError as ModelOutOfMemoryError
    from asyncembed.errors import OptionsError as OptionsError
    from asyncembed.errors import OverloadedError as OverloadedError
    from asyncembed.errors import SourceError as SourceError
    from asyncembed.errors import StoreError as StoreError
    from asyncembed.errors import StoreLockedError as StoreLockedError
    from asyncembed.errors import StoreMismatchError as StoreMismatchError
    from asyncembed.errors import TextError as TextError
    from asyncembed.errors import TextsFailedError as TextsFailedError
    from asyncembed.errors import TextTypeError as TextTypeError
    from asyncembed.generator import EmbeddingGenerator as EmbeddingGenerator
    from asyncembed.options import EmbedOptions as EmbedOptions
    from asyncembed.records import Batch as Batch
    from asyncembed.records import Chunk as Chunk
    from asyncembed.records import EmbeddedChunk as EmbeddedChunk
    from asyncembed.records import EmbeddedText as EmbeddedText
    from asyncembed.records import Summary as Summary
    from asyncembed.records import Text as Text
    from asyncembed.records import TokenText as TokenText
    from asyncembed.records import text_id as text_id
    from asyncembed.sources import read_texts as read_texts
    from asyncembed.store import StoredEmbeddings as StoredEmbeddings
    from asyncembed.store import StoredText as StoredText
    from asyncembed.store import open_embeddings as open_embeddings
    from asyncembed.stream import EmbedStream as EmbedStream
    from asyncembed.stream import embed_stream as embed_stream

# Public names by their module, imported when first used: `import asyncembed` costs next to nothing.
_PUBLIC = {
    "embedder": ("AsyncEmbedder", "CountedVectors", "EmbedderStatistics"),
    "encoders": ("Encoder", "load_encoder"),
    "errors": (
        "AsyncEmbedError",
        "ClosedError",
        "CorruptRecordError",
        "DeadlineError",
        "ModelError",
        "ModelOutOfMemoryError",
        "OptionsError",
        "OverloadedError",
        "SourceError",
        "StoreError",
        "StoreLockedError",
        "StoreMismatchError",
        "TextError",
        "TextTypeError",
        "TextsFailedError",
    ),
    "generator": ("EmbeddingGenerator",),
    "engine.limits": ("TokenLimitEstimator",),
    "options": ("EmbedOptions",),
    "records": ("Batch", "Chunk", "EmbeddedChunk", "EmbeddedText", "Summary", "Text", "TokenText", "text_id"),
    "store": ("StoredEmbeddings", "StoredText", "open_embeddings"),
    "sources": ("read_texts",),
    "stream": ("EmbedStream", "embed_stream"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [  # a list made of the table above, so that no name is kept twice
    "__version__",
    *_MODULE_OF,
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("asyncembed")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
