"""Reading a folder of embeddings: no lock, no writing, also while a job writes to it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asyncembed.errors import CorruptRecordError, OptionsError, StoreError
from asyncembed.iterables import why_other_items, without_line_ends
from asyncembed.records import FloatVector, Rejected, SourceItem, Text, text_id
from asyncembed.store.files import StorePaths, storage_errors
from asyncembed.store.format import STRANGE, Format, StoredText
from asyncembed.store.formats import format_of
from asyncembed.store.index import ask, header_of
from asyncembed.store.ledger import FAILED, Header
from asyncembed.wording import kind_of

_Stamp = tuple[int, int, int]


def open_embeddings(path: str | os.PathLike[str]) -> StoredEmbeddings:
    """The embeddings that a job has saved in a folder.

    Reads little: what the folder was made with. Nothing is locked or written; a job may be writing to the folder.

    Raises:
        StoreError: There is no such folder, it holds no embeddings, or a newer version of this library wrote it.
    """
    return StoredEmbeddings(path)


class StoredEmbeddings:
    """A folder of embeddings, read as it is at each call: `len(s)`, `text in s`, `s[text]`, `for stored in s`.

    The per-text files say what is there; the ledger gives only keys, failures and what the folder was made with.
    Every text is checked as it is read: the file is whole, its text is the one its name says, the vector is finite, and
    it was made with the folder's weights and options.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._paths = StorePaths.of(path)
        self._by_key: dict[str, str] = {}
        self._by_key_stamp: tuple[_Stamp, ...] = ()
        self._texts: Format = format_of(self._paths)
        if os.path.exists(self._paths.root) and not os.path.isdir(self._paths.root):
            raise StoreError(f"{self._paths.root}: is a file, not a folder of embeddings")
        if not os.path.isdir(self._paths.root):
            raise StoreError(f"{self._paths.root}: there is no such folder")
        self._header = self._read_header()
        self._digest = None if self._header is None else self._header.digest()
        if self._header is None and not os.path.isdir(self._paths.data):
            raise StoreError(f"{self._paths.root}: holds no embeddings; a job writes them with save_path={str(path)!r}")

    def __repr__(self) -> str:
        return f"<StoredEmbeddings {self._paths.root!r}>"

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return Path(self._paths.root)

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What the vectors depend on; None if the folder has lost it."""
        return None if self._header is None else dict(self._header.fingerprint)

    @property
    def made_with(self) -> dict[str, Any] | None:
        """Backend, versions and model of the job that began the folder; None if the folder has lost it."""
        return None if self._header is None else dict(self._header.made_with)

    @property
    def dim(self) -> int | None:
        """Numbers in a vector; None if nothing is stored and nothing says it."""
        dim = (self.fingerprint or {}).get("dim")
        if isinstance(dim, int):
            return dim
        first = next((block[0] for block in self._texts.ids()), None)
        return None if first is None else len(self.by_id(first).embedding)

    def __len__(self) -> int:
        with storage_errors(self._paths.data):
            return sum(map(len, self._texts.ids()))

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and self._texts.size(text_id(text)) is not None

    def __getitem__(self, text: str) -> StoredText:
        """The stored text.

        Raises:
            KeyError: It is not there.
            CorruptRecordError: Its file is damaged, or from a folder made with other weights or options.
        """
        return self._read(text_id(text), text)

    def __iter__(self) -> Iterator[StoredText]:
        """Every text, one at a time, ids ascending. One that is removed meanwhile is passed over.

        Raises:
            CorruptRecordError: A file is damaged.
        """
        for identity in self.ids():
            try:
                stored = self.by_id(identity)
            except KeyError:
                continue
            yield stored

    def ids(self) -> list[str]:
        """The ids of all stored texts, ascending."""
        with storage_errors(self._paths.data):
            return sorted(identity for block in self._texts.ids() for identity in block)

    def by_id(self, identity: str) -> StoredText:
        """The stored text with an id.

        Raises:
            KeyError: It is not there.
            CorruptRecordError: Its file is damaged.
        """
        return self._read(identity, identity)

    def by_key(self, key: str) -> StoredText:
        """The stored text that came with a key last; one of them, where one run's input gave it to several.

        The first call reads all keys into memory; a later one does so again if a job wrote since.

        Raises:
            KeyError: No stored text has this key.
            CorruptRecordError: Its file is damaged.
        """
        return self._read(self._keys()[key], key)

    def keys(self) -> list[str]:
        """Every key that came with a text, whether it could be embedded or not."""
        return list(self._keys())

    def failures(self) -> dict[str, str]:
        """Id → reason of the texts that could not be embedded and have not been since."""
        with storage_errors(self._paths.root):
            failed = ask(self._paths, lambda ledger: [row for row in ledger.texts() if row.kind == FAILED])
        return {row.id: row.error or "" for row in failed if self._texts.size(row.id) is None}

    def to_numpy(
        self,
        texts: Iterable[str | SourceItem] | None = None,
        *,
        order: Literal["id", "input"] = "id",
        dtype: npt.DTypeLike = np.float32,
        missing: Literal["raise", "nan"] = "raise",
    ) -> tuple[list[str], npt.NDArray[np.floating[Any]]]:
        """Ids and their vectors as one matrix, filled row by row.

        Args:
            texts: The texts wanted, such as `read_texts("in.csv")` gives; None takes all that are stored.
            order: `id` gives each text once, ids ascending; `input` gives one row for each of `texts`, in their order,
                a text that comes twice in two rows.
            dtype: A floating type.
            missing: What a text that is not stored does: `raise` a KeyError, or give a row of `nan`.

        Returns:
            `(ids, matrix)`, the matrix of shape `(len(ids), dim)`.

        Raises:
            OptionsError: `order="input"` without texts, a table for texts, or an argument that cannot be.
            KeyError: A text is not stored.
            CorruptRecordError: A file is damaged, or the vectors differ in length.
        """
        if order not in ("id", "input") or missing not in ("raise", "nan") or np.dtype(dtype).kind != "f":
            raise OptionsError(
                f"order={order!r} is 'id' or 'input', missing={missing!r} is 'raise' or 'nan', "
                f"dtype={dtype!r} is a floating type"
            )
        if isinstance(texts, str) or (texts is None and order == "input"):
            raise OptionsError(f"texts={texts!r}: order='input' and a choice of texts need an iterable of texts")
        if (reason := why_other_items(texts)) is not None:
            raise OptionsError(reason)
        if texts is None:
            ids = self.ids()
        else:
            named = (text for text in without_line_ends(texts) if not isinstance(text, Rejected))
            ids = [text_id(_text_of(text)) for text in named]
        if order == "id" and texts is not None:
            ids = sorted(set(ids))
        return ids, self._matrix(ids, np.dtype(dtype), missing == "nan")

    def _matrix(self, ids: list[str], dtype: np.dtype[Any], nan: bool) -> npt.NDArray[np.floating[Any]]:
        dim = self.dim or 0
        matrix = np.empty((len(ids), dim), dtype)
        rows: dict[str, int] = {}
        for row, identity in enumerate(ids):
            first = rows.setdefault(identity, row)
            matrix[row] = matrix[first] if first != row else self._vector(identity, dim, nan)
        return matrix

    def _vector(self, identity: str, dim: int, nan: bool) -> FloatVector:
        try:
            vector = self.by_id(identity).embedding
        except KeyError:
            if nan:
                return np.full(dim, np.nan, np.float32)
            reason = f"the text of id {identity} is not stored; missing='nan' gives it a row of nan"
            raise KeyError(reason) from None
        if len(vector) != dim:
            path = self._texts.place(identity)
            reason = f"its vector has {len(vector)} numbers, the folder's have {dim}"
            raise CorruptRecordError(f"{path}: {reason}", reason=reason)
        return vector

    def _read(self, identity: str, name: str) -> StoredText:
        path = self._texts.place(identity)
        with storage_errors(path):
            try:
                stored = self._texts.read(identity)
            except FileNotFoundError:
                raise KeyError(name) from None
        if not self._is_ours(stored):
            advice = "asyncembed-store verify --remove-damaged removes it, and the next run makes it anew"
            raise CorruptRecordError(f"{path}: {STRANGE}; {advice}", reason=STRANGE)
        return stored

    def _is_ours(self, stored: StoredText) -> bool:
        """Whether a text was made as the folder says; a file of an older version may not say it, nor a lost ledger."""
        if stored.fingerprint in (None, self._digest) or self._digest is None:
            return True
        self._header = self._read_header() or self._header  # an overwriting job may have begun the folder anew
        self._digest = None if self._header is None else self._header.digest()
        return stored.fingerprint == self._digest

    def _read_header(self) -> Header | None:
        with storage_errors(self._paths.root):
            return read_header(self._paths)

    def _keys(self) -> dict[str, str]:
        paths = self._paths
        stamp = tuple(map(_stamp, (paths.ledger, f"{paths.ledger}-wal", paths.index, paths.journal)))
        if stamp != self._by_key_stamp:
            with storage_errors(paths.root):
                self._by_key = ask(paths, lambda ledger: dict(ledger.owners()))
            self._by_key_stamp = stamp
        return self._by_key


def read_header(paths: StorePaths) -> Header | None:
    """What a folder was made with; None if nothing says it."""
    if not os.path.exists(paths.ledger):
        return header_of(paths)
    return ask(paths, lambda ledger: ledger.header())


def _stamp(path: str) -> _Stamp:
    """What changes when a file does; zeros if it is not there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _text_of(item: object) -> str:
    text = item.text if isinstance(item, Text) else item
    if not isinstance(text, str):
        raise OptionsError(f"{kind_of(item)} among the texts is no text")
    return text
