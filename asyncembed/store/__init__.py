"""Where vectors stay, and where they are read from: a folder with a ledger and one JSON file a text."""

from asyncembed.store.digests import DigestSet
from asyncembed.store.format import StoredText
from asyncembed.store.reader import StoredEmbeddings, open_embeddings
from asyncembed.store.store import Store

__all__ = ["DigestSet", "Store", "StoredEmbeddings", "StoredText", "open_embeddings"]
