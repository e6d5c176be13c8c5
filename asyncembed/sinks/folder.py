"""The folder itself: its paths, its listing, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from asyncembed.errors import StoreError
from asyncembed.sinks.flushing import flush_folder, missing_folders

_log = logging.getLogger("asyncembed")
_RECORD_NAME = re.compile(r"[0-9a-f]{64}\.json")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{64}\.tmp")
_BLOCK = 4096
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
        """The paths under `save_path`; nothing is touched.

        Raises:
            StoreError: It is relative to a working directory that was removed.
        """
        try:
            return cls(os.path.abspath(os.fspath(save_path)))
        except FileNotFoundError as error:
            reason = "the working directory was removed; change to another, or give an absolute path"
            raise StoreError(f"{os.fspath(save_path)}: {reason}") from error

    @property
    def index(self) -> str:
        """The index."""
        return f"{self.root}/embeddings_index.json"

    @property
    def journal(self) -> str:
        """The journal beside the index."""
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
    """Create the folder and the one of its per-text files.

    Raises:
        StoreError: A file is in the way, or the folder cannot be written to.
    """
    with storage_errors(paths.root):
        missing = missing_folders(paths.data) if durable else []
        os.makedirs(paths.root, exist_ok=True)
        os.makedirs(paths.data, exist_ok=True)
        for path in missing:
            flush_folder(os.path.dirname(path))


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte; `os.write` may take fewer when the disk fills."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_whole(path: str, temporary: str, data: bytes) -> None:
    """Make `path` hold `data`, whole or not at all.

    Not flushed to the platter (`RecordFiles` does that where it is asked for): sizes in the journal find what a power
    cut tore.
    """
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
    """Rename a written file to its own name. An empty folder of that name goes, as a link or a FIFO does.

    Raises:
        OSError: A folder that is not empty is in the way, and is named; or the disk does not take it.
    """
    try:
        os.replace(temporary, path)
    except OSError:
        if not is_folder(path):
            raise
        try:
            os.rmdir(path)
        except OSError:
            raise IsADirectoryError(
                errno.EISDIR, "there is a folder with something in it in the place of this file", path
            ) from None
        os.replace(temporary, path)


def is_folder(path: str) -> bool:
    """Whether a path is a folder itself, and no link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def in_the_way(path: str) -> str | None:
    """What is at a path in the place of a file: "a folder", say; None if it is a file, a link to one, or nothing."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    if stat.S_ISLNK(mode):
        return None if os.path.isfile(path) else "a link that leads to no file"
    # 1. a file   2. what people put there   3. devices
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def write_record(data_folder: str, text_id: str, data: bytes) -> None:
    """Write the file of one text, whole or not at all."""
    write_whole(f"{data_folder}/{text_id}.json", f"{data_folder}/.{text_id}.tmp", data)


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
        os.replace(temporary, path)
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


def record_ids(paths: StorePaths, *, clean: bool = False, only_files: bool = True) -> Iterator[list[str]]:
    """The ids of the per-text files in the folder, in blocks, in no order; nothing is opened.

    Files with other names are left alone.
    """
    block: list[str] = []
    try:
        listing = os.scandir(paths.data)
    except FileNotFoundError:
        return
    with listing:
        for entry in listing:
            name = entry.name
            if _RECORD_NAME.fullmatch(name):
                # Only links cost a call; one that leads back to itself is no file either.
                is_file = os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()
                if only_files and not is_file:
                    continue
                if clean and is_file and not entry.stat().st_size:
                    _log.warning(
                        "%s: it is empty, as a power cut leaves a file; its text will be embedded again", entry.path
                    )
                    remove(entry.path)
                    continue
                block.append(name[:64])
                if len(block) == _BLOCK:
                    yield block
                    block = []
            elif clean and _TEMPORARY_NAME.fullmatch(name):
                remove(entry.path)
    if block:
        yield block


def remove(path: str) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def wipe(paths: StorePaths, *, durable: bool = False) -> None:
    """Remove what earlier jobs of this library wrote, and nothing else.

    The index goes last: killed in between (or, if `durable`, cut off from power), the folder still says what its
    vectors were made with.
    """
    for block in record_ids(paths, clean=True):
        for text_id in block:
            remove(paths.record(text_id))
    if durable:
        flush_folder(paths.data)
    for path in (paths.journal, paths.index):
        remove(path)
