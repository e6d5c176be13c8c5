"""Where records go, and where they are read from: a folder of JSON files."""

from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.json_store import JsonStore
from asyncembed.sinks.reader import StoredEmbeddings, open_embeddings
from asyncembed.sinks.record_file import StoredText

__all__ = ["DigestSet", "JsonStore", "StoredEmbeddings", "StoredText", "open_embeddings"]
