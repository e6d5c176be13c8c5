"""Whether the texts of a folder were made with what the folder, or a run on it, says."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from itertools import compress

from asyncembed.errors import CorruptRecordError, StoreMismatchError
from asyncembed.store.digests import DigestSet
from asyncembed.store.format import Format, StoredText
from asyncembed.store.ledger import Header
from asyncembed.wording import plural

_log = logging.getLogger("asyncembed")
_SHOWN = 2  # files that a message names
_MOVE = "asyncembed-store verify names them: move them away, and the next run makes theirs anew"
_ELSE = "choose another save path, or overwrite"
STRANGE = "it was made with other weights or options than the rest of the folder"


def check_origin(texts: Format, stored: StoredText, header: Header) -> None:
    """Refuse a file from elsewhere in a folder that knows what it was made with.

    Raises:
        StoreMismatchError: Its vector was made with other weights or options.
    """
    if stored.fingerprint not in (None, header.digest()):
        raise StoreMismatchError(
            f"{texts.place(stored.id)}: was made with other weights or options than the rest of the folder; move it "
            "away, or let asyncembed-store verify --remove-damaged do it"
        )


def check_orphans(texts: Format, root: str, ours: Header) -> None:
    """Compare the texts of a folder that lost its ledger and its index with a run that is to go on with it.

    Each file carries a digest of what it was made with; of those without one the length of the vector is compared, and
    a warning says so. A refusal says how many of them differ.

    Raises:
        StoreMismatchError: They were made with other weights or options.
    """
    n_read = n_unknown = n_strange = 0
    shown: list[StoredText] = []
    for identity in (identity for block in texts.ids() for identity in block):
        try:
            stored = texts.read(identity)
        except (CorruptRecordError, FileNotFoundError):
            continue  # damaged since it was listed: found when it is read
        n_read += 1
        n_unknown += stored.fingerprint is None
        if not ours.covers(stored):
            n_strange += 1
            if len(shown) < _SHOWN:
                shown.append(stored)
    if shown:
        raise StoreMismatchError(_refusal(texts, root, ours, shown, n_strange, n_read))
    if n_unknown:
        _log.warning(
            "%s: ledger and index are gone, so what %d of its texts were embedded with is not known; "
            "they are taken to be made with this run's model and options",
            root,
            n_unknown,
        )


def _refusal(texts: Format, root: str, ours: Header, shown: list[StoredText], n_strange: int, n_read: int) -> str:
    """Why a run may not go on with a folder of which some or all files are strange; the first few are shown."""
    dim = len(shown[0].embedding)
    # 1. some of them   2. all of them, of another length   3. all of them, of other options
    if n_strange < n_read:
        names = " and ".join(os.path.relpath(texts.place(stored.id), root) for stored in shown)
        advice = _MOVE if 2 * n_strange < n_read else f"use the options that made them, {_ELSE}"
        return (
            f"{root}: ledger and index are gone, and {n_strange:,} of {plural(n_read, 'file')} "
            f"{'was' if n_strange == 1 else 'were'} made with other weights or options than this run's"
            f"{', such as ' if n_strange > len(shown) else ': '}{names}; {advice}"
        )
    if dim != ours.fingerprint.get("dim", dim):
        return (
            f"{root} holds vectors of {dim} numbers, this run makes {ours.fingerprint['dim']}; "
            f"use the same model, {_ELSE}"
        )
    return (
        f"{root} was made with other weights or options: its ledger and index are gone, and what its "
        f"texts say they were made with is not what this run makes; use the same, {_ELSE}"
    )


class Origins:
    """Which files of a folder that lost its ledger were made alike. Holds 16 bytes a file."""

    def __init__(self) -> None:
        self._alike: dict[tuple[int, str | None], DigestSet] = {}

    def __repr__(self) -> str:
        return f"<Origins {[len(ids) for ids in self._alike.values()]}>"

    def add(self, stored: StoredText) -> None:
        """Count a file in."""
        self._alike.setdefault((len(stored.embedding), stored.fingerprint), DigestSet()).add_many([stored.id])

    def strangers(self, texts: Format) -> Iterator[tuple[str, str]]:
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
        for block in texts.ids():
            for (dim, made_with), ids in self._alike.items():
                # 1. another length   2. the same options, or unknown ones   3. other options
                if dim != most_dim:
                    reason = f"its vector has {dim} numbers, those of {n_dim:,} of {plural(n_all, 'file')} {most_dim}"
                elif made_with in (None, most):
                    continue
                else:
                    reason = f"it was made with other weights or options than {n_most:,} of {plural(n_all, 'file')}"
                for identity in compress(block, ids.contains_many(block)):
                    yield texts.place(identity), reason
