"""Whether the texts of a folder were made with what the folder, or a run on it, says."""

from __future__ import annotations

import logging

from asyncembed.errors import CorruptRecordError, StoreMismatchError
from asyncembed.store.format import Format, StoredText
from asyncembed.store.ledger import Header
from asyncembed.wording import plural

_log = logging.getLogger("asyncembed")
STRANGE = "it was made with other weights or options than the rest of the folder"


def check_origin(texts: Format, stored: StoredText, header: Header) -> None:
    """Refuse a file from elsewhere in a folder that knows what it was made with."""
    if stored.fingerprint not in (None, header.digest()):
        raise StoreMismatchError(
            f"{texts.place(stored.id)}: was made with other weights or options than the rest of the folder; move it "
            "away, or let asyncembed-store verify --remove-damaged do it"
        )


def check_orphans(texts: Format, root: str, ours: Header) -> None:
    """Compare the texts of a folder that lost its ledger and its index with a run that is to go on with it.

    Each file carries a digest of what it was made with; of those without one the length of the vector is compared, and
    a warning says so.
    """
    n_read = n_unknown = n_strange = 0
    shown: StoredText | None = None
    for identity in (identity for block in texts.ids() for identity in block):
        try:
            stored = texts.read(identity)
        except (CorruptRecordError, FileNotFoundError):
            continue  # damaged since it was listed: found when it is read
        n_read += 1
        n_unknown += stored.fingerprint is None
        if not ours.covers(stored):
            n_strange += 1
            shown = shown or stored
    if shown is not None:
        dim = ours.fingerprint.get("dim", len(shown.embedding))
        lengths = f" ({len(shown.embedding)} numbers there, {dim} here)" if dim != len(shown.embedding) else ""
        raise StoreMismatchError(
            f"{root}: ledger and index are gone, and {n_strange:,} of {plural(n_read, 'file')} "
            f"{'was' if n_strange == 1 else 'were'} made with other weights or options than this run's, such as "
            f"{texts.place(shown.id)}{lengths}; use the options that made them, move them away, choose another save "
            "path, or overwrite"
        )
    if n_unknown:
        _log.warning(
            "%s: ledger and index are gone, so what %d of its texts were embedded with is not known; "
            "they are taken to be made with this run's model and options",
            root,
            n_unknown,
        )
