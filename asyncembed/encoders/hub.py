"""Models that are named on a hub: where they lie when they were downloaded, and whether the hub can be asked."""

from __future__ import annotations

import os
from pathlib import Path

from asyncembed.errors import ModelError
from asyncembed.wording import first_line


def downloaded(name: str) -> Path | None:
    """The folder that a model was downloaded to; None if it was not, or is kept elsewhere."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")  # as sentence-transformers itself looks for it
    for full_name in _full_names(name):
        try:
            return Path(snapshot_download(full_name, local_files_only=True, cache_dir=cache))
        except (LocalEntryNotFoundError, HFValidationError):
            continue
    return None


def offline_copy(name: str) -> Path | None:
    """Where a model was downloaded to, if the hub cannot be asked now; None if it can.

    It is asked once: sentence-transformers would ask it again and again for each of some twenty files, for more than a
    minute.

    Raises:
        ModelError: The hub cannot be asked, and the model was not downloaded.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whatever library carries the question
        if (folder := downloaded(name)) is not None:
            return folder
        raise ModelError(
            f"there is no folder {name!r}, no model of that name was downloaded before, and the hub cannot be asked "
            f"for one ({first_line(error).rstrip('.')}). Give the path of a model's folder, or check the name and the "
            "network"
        ) from error
    return None  # whatever it answered: what it has against the model is told when that is loaded


def _full_names(name: str) -> tuple[str, ...]:
    """A name without a maker is one of sentence-transformers' own models; a few, as bert-base-uncased, have none."""
    return (name,) if "/" in name else (f"sentence-transformers/{name}", name)
