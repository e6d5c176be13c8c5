"""Whether the per-text files were made with what the folder, or a run that goes on with it, says."""

from __future__ import annotations

import logging

from asyncembed.errors import CorruptRecordError, StoreMismatchError
from asyncembed.sinks.folder import StorePaths, record_ids
from asyncembed.sinks.header import Header
from asyncembed.sinks.record_file import StoredText, read_record

_log = logging.getLogger("asyncembed")
STRANGE = "it was made with other weights or options than the rest of the folder"


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
    a warning says so.

    Raises:
        StoreMismatchError: They were made with other weights or options.
    """
    if not n_texts:
        return
    n_unknown = 0
    for identity in (identity for block in record_ids(paths) for identity in block):
        try:
            stored = read_record(identity, paths.record(identity))
        except (CorruptRecordError, FileNotFoundError):
            continue  # damaged since it was listed: found when it is read
        if len(stored.embedding) != ours.fingerprint.get("dim", len(stored.embedding)):
            raise StoreMismatchError(
                f"{paths.root} holds vectors of {len(stored.embedding)} numbers, this run makes "
                f"{ours.fingerprint['dim']}; use the same model, choose another save path, or overwrite"
            )
        if not is_of(stored, ours):
            raise StoreMismatchError(
                f"{paths.root} was made with other weights or options: its index and journal are gone, and what its "
                "texts say they were made with is not what this run makes; use the same, choose another save path, "
                "or overwrite"
            )
        n_unknown += stored.fingerprint is None
    if n_unknown:
        _log.warning(
            "%s: index and journal are gone, so what %d of its texts were embedded with is not known; "
            "they are taken to be made with this run's model and options",
            paths.root,
            n_unknown,
        )
