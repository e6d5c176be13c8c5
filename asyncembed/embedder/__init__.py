"""One model inside an async app: many small concurrent requests share its batches."""

from asyncembed.embedder.embedder import AsyncEmbedder, EmbedderStatistics
from asyncembed.embedder.settings import Kind

__all__ = ["AsyncEmbedder", "EmbedderStatistics", "Kind"]
