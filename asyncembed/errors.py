"""The errors asyncembed raises.

AsyncEmbedError
├── OptionsError (ValueError)     an option that cannot be, with what would be
├── SourceError                   the input cannot be read further; says file and line
├── ModelError                    the model or its device cannot go on
│   └── ModelOutOfMemoryError     one chunk alone does not fit into memory
├── StoreError                    the folder of results cannot be used
│   ├── StoreMismatchError        it was made with other weights or options
│   ├── StoreLockedError          another job is writing to it
│   └── CorruptRecordError        one of its files cannot be read back
└── ClosedError                   used again after it ended

A text that cannot be embedded is a *result* (a record with `error` set), never one of these.
"""

from __future__ import annotations


class AsyncEmbedError(Exception):
    """Base of every error this package raises on purpose."""


class OptionsError(AsyncEmbedError, ValueError):
    """An option has a value that cannot be used."""


class SourceError(AsyncEmbedError):
    """The input cannot be read further. The message names the file and the line where there is one."""


class ModelError(AsyncEmbedError):
    """The model cannot be loaded, or its device cannot go on."""


class ModelOutOfMemoryError(ModelError):
    """A single chunk does not fit into the device's memory."""


class StoreError(AsyncEmbedError):
    """The folder of results cannot be read or written."""


class StoreMismatchError(StoreError):
    """The folder holds vectors that this run's model and options would not reproduce."""


class StoreLockedError(StoreError):
    """Another job, named in the message, is writing to the folder."""


class CorruptRecordError(StoreError):
    """A file of the folder is damaged: torn, empty, or not what its name says."""


class ClosedError(AsyncEmbedError):
    """A stream or reader was used again after it had ended."""
