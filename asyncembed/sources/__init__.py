"""Sources: files and iterables as an asynchronous stream of texts."""

from asyncembed.sources.feed import TextFeed, check_source
from asyncembed.sources.files import FileTexts, read_texts

__all__ = ["FileTexts", "TextFeed", "check_source", "read_texts"]
