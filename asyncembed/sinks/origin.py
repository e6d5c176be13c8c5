"""Whether the files of a folder are this library's, and made with what the folder, or a run on it, says."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import compress

from asyncembed.errors import CorruptRecordError, StoreError, StoreMismatchError
from asyncembed.sinks.digests import DigestSet
from asyncembed.sinks.folder import StorePaths, record_ids, storage_errors
from asyncembed.sinks.header import Header
from asyncembed.sinks.record_file import StoredText, read_record
from asyncembed.wording import plural

_log = logging.getLogger("asyncembed")
_SHOWN = 2  # files that a message names
_MOVE = "asyncembed-store verify names them: move them away, and the next run makes theirs anew"
_ELSE = "choose another save path, or overwrite"
STRANGE = "it was made with other weights or options than the rest of the folder"

# How the files begin that a job replaces or removes, also if somebody formatted them anew.
_INDEX = re.compile(
    rb'\A\s*\{\s*"(version"\s*:\s*\d+\s*,\s*")?fingerprint"\s*:\s*\{|"[0-9a-f]{64}"\s*:\s*\{\s*"status"'
)
_JOURNAL = re.compile(rb'\A\{"version":\d+[,}]')
_ERRORS = re.compile(rb'\A\s*\{\s*"(index"\s*:\s*(\d+|null)\s*,\s*"id|place"\s*:\s*("([^"\\]|\\.)*"|null)\s*,\s*"key)"')
_OWNER = re.compile(rb'\A\{"pid":')
_LOCK = re.compile(rb"\A\d+\s")  # where the file system has no locks; empty elsewhere
_RECORD = rb'\s*\{\s*"id"\s*:\s*"%b"'
_HEAD_BYTES = 1 << 16


def check_ours(paths: StorePaths) -> None:
    """Refuse a folder in which another program's file has the name of one that a job replaces or removes.

    Where nothing else says that the folder is this library's, its per-text files are looked at too. Where something
    does, an index, journal or text that cannot be read is damaged, and no stranger.

    Raises:
        StoreError: There is such a file, which is named.
    """
    shapes = {paths.errors: _ERRORS, paths.owner: _OWNER, paths.lock: _LOCK}
    cores = {paths.journal: _JOURNAL, paths.index: _INDEX}
    with storage_errors(paths.root):
        heads = {path: _head(path) for path in (*shapes, *cores)}
        strange = [path for path, shape in shapes.items() if heads[path] and not shape.match(heads[path])]
        if not any(shape.search(heads[path]) for path, shape in cores.items()):
            n_texts = 0
            for identity in (identity for block in record_ids(paths) for identity in block):
                n_texts += 1
                if not _is_record(paths.record(identity), identity):
                    strange.append(paths.record(identity))
                    break
            strange += [path for path in cores if heads[path] and not n_texts]
    if strange:
        raise StoreError(
            f"{strange[0]}: this file is not asyncembed's, and a job would replace or remove it; move it away, or "
            "choose another save path"
        )


def _head(path: str) -> bytes:
    """How a file begins; empty if there is none, or nothing but the zeros that a power cut leaves."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES).lstrip(b"\0")


def _is_record(path: str, identity: str) -> bool:
    """Whether a file is a text's, be it torn."""
    head = _head(path)
    if not head or re.match(_RECORD % identity.encode(), head):
        return True
    try:
        return read_record(identity, path).id == identity
    except CorruptRecordError:
        return False


def is_of(stored: StoredText, header: Header) -> bool:
    """Whether a text was made with what a header says, as far as its file tells."""
    dim = header.fingerprint.get("dim", len(stored.embedding))
    return stored.fingerprint in (None, header.digest()) and dim == len(stored.embedding)


def check_origin(paths: StorePaths, stored: StoredText, header: Header) -> None:
    """Refuse a file from elsewhere in a folder that knows what it was made with.

    Raises:
        StoreMismatchError: Its vector was made with other weights or options.
    """
    if stored.fingerprint not in (None, header.digest()):
        raise StoreMismatchError(
            f"{paths.record(stored.id)}: was made with other weights or options than the rest of the folder; move it "
            "away, or let asyncembed-store verify --remove-damaged do it"
        )


def check_orphans(paths: StorePaths, ours: Header, n_texts: int) -> None:
    """Compare the texts of a folder that lost index and journal with a run that is to go on with it.

    Each file carries a digest of what it was made with; of those without one the length of the vector is compared, and
    a warning says so. A refusal says how many of them differ.

    Raises:
        StoreMismatchError: They were made with other weights or options.
    """
    if not n_texts:
        return
    n_read = n_unknown = n_strange = 0
    shown: list[StoredText] = []
    for identity in (identity for block in record_ids(paths) for identity in block):
        try:
            stored = read_record(identity, paths.record(identity))
        except (CorruptRecordError, FileNotFoundError):
            continue  # damaged since it was listed: found when it is read
        n_read += 1
        n_unknown += stored.fingerprint is None
        if not is_of(stored, ours):
            n_strange += 1
            if len(shown) < _SHOWN:
                shown.append(stored)
    if shown:
        raise StoreMismatchError(_refusal(paths, ours, shown, n_strange, n_read))
    if n_unknown:
        _log.warning(
            "%s: index and journal are gone, so what %d of its texts were embedded with is not known; "
            "they are taken to be made with this run's model and options",
            paths.root,
            n_unknown,
        )


def _refusal(paths: StorePaths, ours: Header, shown: list[StoredText], n_strange: int, n_read: int) -> str:
    """Why a run may not go on with a folder of which some or all files are strange; the first few are shown."""
    dim = len(shown[0].embedding)
    # 1. some of them   2. all of them, of another length   3. all of them, of other options
    if n_strange < n_read:
        names = " and ".join(os.path.relpath(paths.record(stored.id), paths.root) for stored in shown)
        advice = _MOVE if 2 * n_strange < n_read else f"use the options that made them, {_ELSE}"
        return (
            f"{paths.root}: index and journal are gone, and {n_strange:,} of {plural(n_read, 'file')} "
            f"{'was' if n_strange == 1 else 'were'} made with other weights or options than this run's"
            f"{', such as ' if n_strange > len(shown) else ': '}{names}; {advice}"
        )
    if dim != ours.fingerprint.get("dim", dim):
        return (
            f"{paths.root} holds vectors of {dim} numbers, this run makes {ours.fingerprint['dim']}; "
            f"use the same model, {_ELSE}"
        )
    return (
        f"{paths.root} was made with other weights or options: its index and journal are gone, and what its "
        f"texts say they were made with is not what this run makes; use the same, {_ELSE}"
    )


class Origins:
    """Which files of a folder without index and journal were made alike. Holds 16 bytes a file."""

    def __init__(self) -> None:
        self._alike: dict[tuple[int, str | None], DigestSet] = {}

    def __repr__(self) -> str:
        return f"<Origins {[len(ids) for ids in self._alike.values()]}>"

    def add(self, stored: StoredText) -> None:
        """Count a file in."""
        self._alike.setdefault((len(stored.embedding), stored.fingerprint), DigestSet()).add_many([stored.id])

    def strangers(self, paths: StorePaths) -> Iterator[tuple[str, str]]:
        """Path and reason of each file that was not made as most were. One that does not say may be one of them."""
        if len(self._alike) < 2:
            return
        by_dim: Counter[int] = Counter()
        for (dim, _), ids in self._alike.items():
            by_dim[dim] += len(ids)
        most_dim, n_dim = by_dim.most_common(1)[0]
        told = {made_with: len(ids) for (dim, made_with), ids in self._alike.items() if dim == most_dim and made_with}
        most, n_most = max(told.items(), key=lambda item: item[1], default=(None, 0))
        n_all = by_dim.total()
        for block in record_ids(paths):
            for (dim, made_with), ids in self._alike.items():
                # 1. another length   2. the same options, or unknown ones   3. other options
                if dim != most_dim:
                    reason = f"its vector has {dim} numbers, those of {n_dim:,} of {plural(n_all, 'file')} {most_dim}"
                elif made_with in (None, most):
                    continue
                else:
                    reason = f"it was made with other weights or options than {n_most:,} of {plural(n_all, 'file')}"
                for identity in compress(block, ids.contains_many(block)):
                    yield paths.record(identity), reason
