"""What a folder was made with, as index and journal repeat it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncembed.errors import StoreError, StoreMismatchError
from asyncembed.sinks.codec import decode_json, encode_json

VERSION = 1
_SHOWN = 60  # characters of a value in a message


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

    def encoded(self) -> bytes:
        """The header as a JSON object of its own."""
        return encode_json({"version": VERSION, "fingerprint": self.fingerprint, "made_with": self.made_with})

    def digest(self) -> str:
        """A short digest of the fingerprint, as each per-text file carries it: a file says what it was made with."""
        plain = json.dumps(self.fingerprint, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def compare(self, other: Header, folder: str) -> None:
        """Refuse another fingerprint, key by key.

        Raises:
            StoreMismatchError: Names each key that differs, with both values.
        """
        mine, others = self.fingerprint, other.fingerprint
        differing = [key for key in (*mine, *(key for key in others if key not in mine)) if _differ(key, mine, others)]
        if differing:
            told = "; ".join(f"{key} is {_shown(mine, key)} there, {_shown(others, key)} now" for key in differing)
            raise StoreMismatchError(
                f"{folder} was made with other weights or options: {told}; "
                "use the same, choose another save path, or overwrite"
            )


def header_from(fields: object, path: str) -> Header | None:
    """The header among the fields of a JSON object; None if there is none, or an empty one.

    Raises:
        StoreError: A newer version of this library wrote it.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("version"), int):
        return None
    if fields["version"] != VERSION:
        raise StoreError(
            f"{path}: written in version {fields['version']} of the format, this is version {VERSION}; "
            "update asyncembed, or choose another save path"
        )
    fingerprint, made_with = fields.get("fingerprint"), fields.get("made_with", {})
    if not isinstance(fingerprint, dict) or not isinstance(made_with, dict):
        return None
    return Header(fingerprint, made_with)


def _differ(key: str, mine: Mapping[str, object], others: Mapping[str, object]) -> bool:
    return key not in mine or key not in others or mine[key] != others[key]


def _shown(fields: Mapping[str, object], key: str) -> str:
    if key not in fields:
        return "not recorded"
    text = encode_json(fields[key]).decode()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
