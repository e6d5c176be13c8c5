"""The ledger of a folder: how its vectors were made, and what became of each text, row after row, in SQLite.

Rows are appended and never changed: the last row with a status says what became of a text, and the last row with a key
who has it. In WAL mode other processes read it while a job writes; a clean end leaves one plain file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from asyncembed.errors import StoreError, StoreMismatchError
from asyncembed.store.files import decode_json, encode_json, flush_folder, remove
from asyncembed.store.format import StoredText

_log = logging.getLogger("asyncembed")
_VERSION = 1
_APPLICATION = 0x61736D62  # in the file's header: a database of another program is none of ours
_BLOCK = 4096
_SHOWN = 60  # characters of a value in a message

DONE, FAILED, REMOVED, KEY = "done", "failed", "removed", "key"

_TABLES = f"""
begin;
create table meta(name text primary key, value text not null);
create table runs(run integer primary key, clean integer not null default 0);
create table log(
    seq integer primary key, run integer not null, kind text not null, id blob not null, key text,
    n_tokens integer, n_chunks integer, size integer, error text
);
pragma application_id = {_APPLICATION};
pragma user_version = {_VERSION};
commit;
"""
# Texts go in as bytes: half a surrogate pair, which a key or a reason may hold, is no UTF-8 to the driver.
_INSERT = """
insert into log(run, kind, id, key, n_tokens, n_chunks, size, error)
values (?, ?, ?, cast(? as text), ?, ?, ?, cast(? as text))
"""


class LedgerDamaged(Exception):  # never reaches a user: the ledger is made anew
    """The file is no database, or a torn one."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a folder was made with.

    Attributes:
        fingerprint: What changes a vector; compared before anything is added.
        made_with: Backend, versions, the model's name: recorded by the job that began the folder, not compared.
    """

    fingerprint: dict[str, Any]
    made_with: dict[str, Any]

    @classmethod
    def of(cls, fingerprint: Mapping[str, object], made_with: Mapping[str, object]) -> Header:
        """A header whose values are what they will be when read back: tuples become lists."""
        return cls(decode_json(encode_json(dict(fingerprint))), decode_json(encode_json(dict(made_with))))

    def digest(self) -> str:
        """A short digest of the fingerprint, as each per-text file carries it: a file says what it was made with."""
        plain = json.dumps(self.fingerprint, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def covers(self, stored: StoredText) -> bool:
        """Whether a text was made with this, as far as its file tells."""
        dim = self.fingerprint.get("dim", len(stored.embedding))
        return stored.fingerprint in (None, self.digest()) and dim == len(stored.embedding)

    def compare(self, other: Header, folder: str) -> None:
        """Refuse another fingerprint, key by key."""
        mine, others = self.fingerprint, other.fingerprint
        keys = (*mine, *(key for key in others if key not in mine))
        differing = [key for key in keys if key not in mine or key not in others or mine[key] != others[key]]
        if differing:
            told = "; ".join(f"{key} is {_shown(mine, key)} there, {_shown(others, key)} now" for key in differing)
            raise StoreMismatchError(
                f"{folder} was made with other weights or options: {told}; "
                "use the same, choose another save path, or overwrite"
            )


def _shown(fields: Mapping[str, object], key: str) -> str:
    if key not in fields:
        return "not recorded"
    text = encode_json(fields[key]).decode()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class Row(NamedTuple):
    """What is appended about a text: `kind` is `done`, `failed`, `removed`, or `key` for one more key."""

    kind: str
    id: str
    key: str | None = None
    n_tokens: int | None = None
    n_chunks: int | None = None
    size: int | None = None
    error: str | None = None


class Ledger:
    """A ledger, to write to for who holds the folder's lock (`write`), or to read (`read`)."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._db = connection
        self._db.text_factory = lambda raw: raw.decode("utf-8", "surrogatepass")
        self._path = path
        self._run: int | None = None
        self._n_copies = 0

    def __repr__(self) -> str:
        return f"<Ledger {self._path!r} run={self._run}>"

    @classmethod
    def write(cls, path: str, *, durable: bool = False) -> Ledger:
        """The ledger at a path, made if it is not there. With `durable` a commit is on the platter when it returns."""
        is_new = not os.path.exists(path)
        with _translated(path):
            # The thread that opens it need not be the one that closes it; no two use it at once.
            ledger = cls(sqlite3.connect(path, isolation_level=None, check_same_thread=False), path)
        try:
            with _translated(path):
                ledger._prepare(durable)
            if is_new and durable:
                flush_folder(os.path.dirname(path))
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def read(cls, path: str, *, thorough: bool = False) -> Ledger | None:
        """The ledger at a path as it is at the moment; None if there is none, or none that can be read."""
        if not os.path.exists(path):
            return None
        # A folder that may not be written, or lies on a network: without a log beside it, the file alone is all.
        modes = ["mode=ro"] if os.path.exists(f"{path}-wal") else ["mode=ro", "immutable=1"]
        reason = ""
        for mode in modes:
            ledger = None
            try:
                with _translated(path):
                    uri = f"{Path(path).as_uri()}?{mode}"
                    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
                    ledger = cls(db, path)
                    ledger._check_version()
                    ledger._check_whole()
                    if thorough:
                        ledger._check_rows()
                    return ledger
            except (LedgerDamaged, OSError) as error:
                reason = str(error)
                if ledger is not None:
                    ledger.close()
            except BaseException:
                if ledger is not None:
                    ledger.close()
                raise
        _log.warning("%s: cannot be read (%s); keys and failures may be missing", path, reason)
        return None

    @classmethod
    def temporary(cls) -> Ledger:
        """An empty ledger that is gone when it is closed, on disk if it grows."""
        ledger = cls(sqlite3.connect("", isolation_level=None, check_same_thread=False), "")
        ledger._db.executescript(_TABLES)
        return ledger

    @property
    def is_temporary(self) -> bool:
        """Whether it was made for reading a folder that has none."""
        return not self._path

    def _prepare(self, durable: bool) -> None:
        try:
            mode = self._db.execute("pragma journal_mode = wal").fetchone()[0]
        except sqlite3.OperationalError:
            mode = ""
        if mode != "wal":  # a file system without shared memory, or somebody is reading
            self._db.execute("pragma journal_mode = truncate")
        self._db.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
        if self._check_version() == 0:
            self._db.executescript(_TABLES)
        self._check_whole()

    def _check_version(self) -> int:
        version: int = self._db.execute("pragma user_version").fetchone()[0]
        if version > _VERSION:
            raise StoreError(
                f"{self._path}: written in version {version} of the format, this is version {_VERSION}; "
                "update asyncembed, or choose another save path"
            )
        return version

    def _check_whole(self) -> None:
        """Whether the tables are there, and the file is as long as it says."""
        n_pages, page = (self._db.execute(f"pragma {name}").fetchone()[0] for name in ("page_count", "page_size"))
        if not os.path.exists(f"{self._path}-wal") and os.path.getsize(self._path) < n_pages * page:
            raise LedgerDamaged("it is cut short")
        for table in ("meta", "runs", "log"):
            self._db.execute(f"select * from {table} limit 1").fetchone()

    def _check_rows(self) -> None:
        """Whether every page and every row can be read."""
        if (said := self._db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise LedgerDamaged(said)
        for _ in chain(self.texts(), self.owners()):
            pass

    def close(self, *, plain: bool = False) -> None:
        """Close it. With `plain`, what other processes need while it is written goes into the one file. Idempotent."""
        if plain:
            with contextlib.suppress(
                sqlite3.Error, UnicodeDecodeError
            ):  # somebody is reading: the next clean end does it
                self._db.execute("pragma journal_mode = delete")
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    # --- what it says ---

    def header(self) -> Header | None:
        """What the folder's vectors were made with; None if that is not recorded."""
        with _translated(self._path):
            found = dict(self._db.execute("select name, value from meta where name in ('fingerprint', 'made_with')"))
        try:
            return Header(decode_json(found["fingerprint"].encode()), decode_json(found["made_with"].encode()))
        except KeyError:
            return None
        except ValueError as error:
            raise LedgerDamaged(str(error)) from error

    def is_clean(self) -> bool:
        """Whether every run ended by itself, or was looked after since."""
        with _translated(self._path):
            return self._db.execute("select 1 from runs where not clean limit 1").fetchone() is None

    def n_done(self) -> int | None:
        """The texts that were there at the last clean end."""
        with _translated(self._path):
            found = self._db.execute("select value from meta where name = 'n_done'").fetchone()
        return None if found is None or not str(found[0]).isdecimal() else int(found[0])

    def texts(self) -> Iterator[Row]:
        """What became of each text, ids ascending, with the key that it came with then."""
        for identity, kind, key, n_tokens, n_chunks, size, error, _ in self._copied(
            "select id, kind, key, n_tokens, n_chunks, size, error, max(seq) from log where kind <> 'key' group by id"
        ):
            numbers_fit = all(isinstance(number, int | None) for number in (n_tokens, n_chunks, size))
            if kind not in (DONE, FAILED, REMOVED) or not numbers_fit or not isinstance(error, str | None):
                raise LedgerDamaged("a row is not as it was written")
            yield Row(kind, _hex(identity), key, n_tokens, n_chunks, size, error)

    def done(self) -> Iterator[str]:
        """The texts that are called done, ids ascending."""
        return (row.id for row in self.texts() if row.kind == DONE)

    def unchecked(self) -> Iterator[tuple[str, int | None]]:
        """Id and size of each text that was saved by a run that did not end by itself."""
        rows = self._copied(
            "select id, size, max(seq) from log where kind = 'done' and run in (select run from runs where not clean) "
            "group by id"
        )
        return ((_hex(identity), size) for identity, size, _ in rows)

    def owners(self) -> Iterator[tuple[str, str]]:
        """Each key and the text that has it, ids ascending, the keys of a text in the order they came."""
        rows = self._copied(
            "select key, id from (select key, id, max(seq) as seq from log where key is not null group by key) "
            "order by id, seq"
        )
        return ((str(key), _hex(identity)) for key, identity in rows)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every text and each key that it ever came with."""
        rows = self._copied("select distinct id, key from log where key is not null")
        return ((_hex(identity), str(key)) for identity, key in rows)

    def is_empty(self) -> bool:
        """Whether nothing was appended yet."""
        with _translated(self._path):
            return self._db.execute("select 1 from log limit 1").fetchone() is None

    def _copied(self, select: str) -> Iterator[Sequence[Any]]:
        """The rows of a question, copied first: no transaction is held while they are gone through."""
        self._n_copies += 1
        copy = f"copy{self._n_copies}"
        with _translated(self._path):
            self._db.execute(f"create temp table {copy} as {select}")
            cursor = self._db.execute(f"select * from {copy} order by rowid")
            while rows := cursor.fetchmany(_BLOCK):
                yield from rows
            self._db.execute(f"drop table {copy}")

    # --- what is added ---

    def set_header(self, header: Header) -> None:
        """Record what the folder's vectors are made with."""
        for name, value in (("fingerprint", header.fingerprint), ("made_with", header.made_with)):
            self._set(name, encode_json(value).decode())

    def begin(self) -> None:
        """A run has begun: it is recorded before the first file that the ledger is to know."""
        if self._run is None:
            with _translated(self._path):
                self._run = self._db.execute("insert into runs default values").lastrowid

    @property
    def is_running(self) -> bool:
        """Whether a run has begun and not ended."""
        return self._run is not None

    def append(self, rows: Iterable[Row]) -> None:
        """Append rows in transactions of a few thousand."""
        todo = iter(rows)
        while block := list(islice(todo, _BLOCK)):
            self.begin()
            values = [
                (self._run, kind, bytes.fromhex(identity), _raw(key), n_tokens, n_chunks, size, _raw(error))
                for kind, identity, key, n_tokens, n_chunks, size, error in block
            ]
            with _translated(self._path):
                self._db.execute("begin")
                try:
                    self._db.executemany(_INSERT, values)
                    self._db.execute("commit")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("rollback")
                    raise

    def end(self, n_done: int) -> None:
        """Every run has ended by itself, or was looked after; so many texts are there."""
        self._set("n_done", str(n_done))
        with _translated(self._path):
            self._db.execute("update runs set clean = 1 where not clean")
        self._run = None

    def _set(self, name: str, value: str) -> None:
        with _translated(self._path):
            self._db.execute("insert or replace into meta(name, value) values (?, ?)", (name, value))


def remove_ledger(path: str) -> None:
    """Remove a ledger and what lies beside it. The file goes first: SQLite discards a log without one."""
    for name in (path, f"{path}-wal", f"{path}-shm", f"{path}-journal"):
        remove(name)


def is_ours(path: str) -> bool | None:
    """Whether a database is this library's, or an empty one; None if there is none, or it cannot be told.

    It is asked through SQLite: to open and close the file would free the locks that this process has on it.
    """
    if not os.path.isfile(path):
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)) as db:
            application: int = db.execute("pragma application_id").fetchone()[0]
            is_empty = db.execute("select 1 from sqlite_master limit 1").fetchone() is None
    except (sqlite3.Error, UnicodeDecodeError):  # the second in an error's own words
        return None
    return is_empty or application == _APPLICATION


def _hex(identity: object) -> str:
    if not isinstance(identity, bytes) or len(identity) != 32:
        raise LedgerDamaged("a row is not as it was written")
    return identity.hex()


def _raw(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


_ERRORS = {"disk is full": errno.ENOSPC, "readonly": errno.EROFS, "unable to open": errno.EACCES}


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """SQLite's errors as what they are: damage, or a disk that refuses."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise LedgerDamaged("it holds bytes that are not UTF-8") from error
    except sqlite3.Error as error:
        told = str(error)
        # 1. damage; tables that another program made are no better   2. what the path says   3. what SQLite says
        if any(words in told for words in ("not a database", "malformed", "no such", "has no column")):
            raise LedgerDamaged(told) from error
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            number = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
        elif os.path.isdir(path):
            number = errno.EISDIR
        else:
            number = next((number for words, number in _ERRORS.items() if words in told), errno.EIO)
        raise OSError(number, os.strerror(number), path) from error
