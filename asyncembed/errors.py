"""The errors asyncembed raises.

AsyncEmbedError
├── OptionsError (ValueError)     an option that cannot be, with what would be
├── TextTypeError (TypeError)     something else where a text or a list of texts belongs
├── SourceError                   the input cannot be read further; says file and line
├── ModelError                    the model or its device cannot go on
│   └── ModelOutOfMemoryError     one chunk alone does not fit into memory
├── StoreError                    the folder of results cannot be used
│   ├── StoreMismatchError        it was made with other weights or options
│   ├── StoreLockedError          another job is writing to it
│   └── CorruptRecordError        one of its files cannot be read back
├── TextError                     a text of an app's request cannot be embedded
├── TextsFailedError              texts failed, where that is an error and no result
├── OverloadedError               no room for a request that would not wait
├── DeadlineError (TimeoutError)  a request took longer than it was given
└── ClosedError                   used again after it ended

In a job a text that cannot be embedded is a *result* (a record with `error` set), never one of these.
"""

from __future__ import annotations


class AsyncEmbedError(Exception):
    """Base of every error this package raises on purpose."""


class OptionsError(AsyncEmbedError, ValueError):
    """An option has a value that cannot be used."""


class TextTypeError(AsyncEmbedError, TypeError):
    """There is something else where a text or a list of texts belongs."""


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
    """A file of the folder is damaged: torn, empty, or not what its name says.

    Attributes:
        reason: What is wrong with it, without its path and what to do; the message where nothing shorter was given.
    """

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class TextError(AsyncEmbedError):
    """A text of a request cannot be embedded.

    Attributes:
        index: Its position in the request.
        reason: Why, for a person.
    """

    def __init__(self, index: int, text: str, reason: str) -> None:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        super().__init__(f"text {index} ({shown!r}) cannot be embedded: {reason}")
        self.index = index
        self.reason = reason
        self._made_of = (index, shown, reason)

    def __reduce__(self) -> tuple[type[TextError], tuple[int, str, str]]:
        """It reaches another process as it is: an executor whose task raised it would break otherwise."""
        return type(self), self._made_of


class TextsFailedError(AsyncEmbedError):
    """Texts of a job could not be embedded: one with `on_error="raise"`, or all of what was awaited."""


class KilledBeforeError(AsyncEmbedError):
    """A chunk is not tried: two runs on this machine were killed while it was all that ran."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__(
            f"two runs were killed while a chunk of {n_tokens} tokens of it ran alone, most likely for lack of memory; "
            "it is tried again with another chunk_size, with a token_limit of your own, or with more memory"
        )


class OverloadedError(AsyncEmbedError):
    """There is no room for a request now, and it was not to wait.

    Attributes:
        can_fit: Whether there will be room when the requests under way are done; False for one that is too large
            for the whole of it.
    """

    def __init__(self, message: str, *, can_fit: bool = True) -> None:
        super().__init__(message)
        self.can_fit = can_fit


class DeadlineError(AsyncEmbedError, TimeoutError):
    """A request was not answered within its deadline; what was left of it is not computed."""


class ClosedError(AsyncEmbedError):
    """A stream, reader or embedder was used after it had ended, or ended while it was used."""
