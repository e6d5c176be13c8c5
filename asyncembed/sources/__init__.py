"""Sources: files and iterables as an asynchronous stream of texts."""

from asyncembed.sources.feed import TextFeed
from asyncembed.sources.files import FileTexts, read_texts

__all__ = ["FileTexts", "TextFeed", "read_texts"]
