"""One model inside an async app: many small concurrent requests share its batches."""

from asyncembed.embedder.embedder import AsyncEmbedder, EmbedderStatistics
from asyncembed.embedder.requests import CountedVectors
from asyncembed.encoders import Kind

__all__ = ["AsyncEmbedder", "CountedVectors", "EmbedderStatistics", "Kind"]
