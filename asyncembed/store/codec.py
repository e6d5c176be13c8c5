"""JSON bytes: orjson where it can, the standard library for the rare text that orjson refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson


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
