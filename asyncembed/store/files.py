"""A folder on the disk: its paths, its JSON, files that appear whole or not at all, and what to say on a refusal."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import orjson

from asyncembed.errors import StoreError


def encode_json(value: object) -> bytes:
    """One line of JSON without blanks.

    orjson refuses strings with lone surrogates and whole numbers beyond 64 bits; those are written by `json`, in
    ASCII with escapes.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        return json.dumps(value, separators=(",", ":"), default=_plain).encode("ascii")


def decode_json(data: bytes) -> Any:
    """The value that `data` encodes."""
    try:
        return orjson.loads(data)
    except ValueError:
        if b"\\u" not in data:
            raise
    try:
        return json.loads(data)  # takes the escaped lone surrogates that orjson refuses
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _plain(value: object) -> object:
    """Arrays and numbers of numpy as `json` knows them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


if sys.platform == "darwin":
    import fcntl

_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY

_SPACE = "free some space and run the same command again: what is saved stays"
_RIGHTS = "choose another save path, or get the right to write to this one"
_NO_FOLDER = "it has to be a folder; choose another save path"
_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "a file may not grow further here; raise the limit (ulimit -f) and run the same command again",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.ENOENT: "the folder was moved or removed; put it back, or run the same command again",
    errno.EISDIR: "move that folder away and run the same command again: what is saved stays",
    errno.EIO: "the disk reports a fault; check it, then run the same command again: what is saved stays",
}


@dataclass(frozen=True, slots=True)
class StorePaths:
    """Where everything lies under `root`, which is absolute: the job may change its working directory."""

    root: str

    @classmethod
    def of(cls, save_path: str | os.PathLike[str]) -> StorePaths:
        """The paths under `save_path`; nothing is touched."""
        try:
            return cls(os.path.abspath(os.fspath(save_path)))
        except FileNotFoundError as error:
            reason = "the working directory was removed; change to another, or give an absolute path"
            raise StoreError(f"{os.fspath(save_path)}: {reason}") from error

    @property
    def ledger(self) -> str:
        """How the vectors were made, and what became of each text."""
        return f"{self.root}/ledger.sqlite"

    @property
    def index(self) -> str:
        """The ledger's export."""
        return f"{self.root}/embeddings_index.json"

    @property
    def journal(self) -> str:
        """What version 1 kept beside the index while a job ran."""
        return f"{self.root}/embeddings_index.journal"

    @property
    def data(self) -> str:
        """The folder of the per-text files."""
        return f"{self.root}/embeddings_data"

    @property
    def errors(self) -> str:
        """This run's failed texts and skipped rows."""
        return f"{self.root}/errors.jsonl"

    @property
    def lock(self) -> str:
        """The file that the kernel lock is taken on."""
        return f"{self.root}/.lock"

    @property
    def owner(self) -> str:
        """Who holds the lock."""
        return f"{self.root}/.lock.owner"

    def record(self, text_id: str) -> str:
        """The file of one text."""
        return f"{self.data}/{text_id}.json"


def storage_error(path: str, error: OSError) -> StoreError:
    """The error for a person: path, the system's reason, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "check the folder and run the same command again")
    return StoreError(f"{path}: {error.strerror or error}; {advice}")


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StoreError` that names the file, or `path` where the error names none."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else path
        raise storage_error(name, error) from error


def make_folders(paths: StorePaths, *, durable: bool = False) -> None:
    """Create the folder and the one of its per-text files."""
    missing = []
    path = paths.data
    while durable and not os.path.isdir(path) and path != os.path.dirname(path):
        missing.append(path)
        path = os.path.dirname(path)
    with storage_errors(paths.root):
        os.makedirs(paths.root, exist_ok=True)
        os.makedirs(paths.data, exist_ok=True)
        for path in missing:
            flush_folder(os.path.dirname(path))


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte; `os.write` may take fewer when the disk fills."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_whole(path: str, data: bytes, *, temporary: str | None = None) -> None:
    """Make `path` hold `data`, whole or not at all. It is not flushed to the platter."""
    temporary = temporary or temporary_of(path)
    try:
        descriptor = os.open(temporary, NEW_FILE, 0o666)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def put_in_place(temporary: str, path: str) -> None:
    """Rename a written file to its own name."""
    try:
        os.replace(temporary, path)
    except OSError:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "there is a folder in the place of this file", path) from None
        raise


def temporary_of(path: str) -> str:
    """The temporary name beside one of the folder's own files; it never ends in `.json`."""
    folder, name = os.path.split(path)
    return f"{folder}/.{name}.tmp"


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file to stream into that takes the place of `path`, flushed to disk, when the block ends without error."""
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def append_lines(path: str, lines: list[bytes]) -> None:
    """Append whole lines in one write."""
    descriptor = os.open(path, APPEND, 0o666)
    try:
        write_all(descriptor, b"".join(lines))
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def flush(descriptor: int) -> None:
    """Wait until a file's bytes are on the platter, past the drive's own cache."""
    if sys.platform == "darwin":  # where fsync stops at the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def flush_folder(path: str) -> None:
    """Wait until the names in a folder are on the platter. Windows has no such call and keeps them by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
