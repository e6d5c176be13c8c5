"""One model inside an async app: many small concurrent requests share its batches."""

from asyncembed.embedder.embedder import AsyncEmbedder, CountedVectors
from asyncembed.embedder.settings import Kind
from asyncembed.embedder.statistics import EmbedderStatistics

__all__ = ["AsyncEmbedder", "CountedVectors", "EmbedderStatistics", "Kind"]
