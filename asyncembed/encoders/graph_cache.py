"""Checked graphs in the user's cache folder, so that the next start needs neither torch nor sentence-transformers.

An entry is a folder named by a key over the model's files and the versions that made it. It appears whole or not at
all (written beside and renamed), and its files are checked against their digests when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from asyncembed.cache import cache_folder

logger = logging.getLogger("asyncembed")

_FORMAT = 1
_FILES = ("model.xml", "model.bin", "tokenizer.json")
_IGNORED = (".md", ".gitattributes", ".py", ".onnx", ".h5", ".msgpack", ".ot", ".pyc")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """What must be known of a model besides its graph.

    Attributes:
        dim: Dimensions of a vector.
        max_tokens: Most tokens of a row.
        with_types: Whether it takes `token_type_ids`.
        pad_id: The padding token.
        pads_left: Whether rows are padded on the left.
        unknown: The unknown token; None if the vocabulary has none.
        prompts: The model's own prompts.
        default_prompt_name: The one used if none is named.
        fingerprint: The torch encoder's, in float32.
        versions: What made it.
    """

    dim: int
    max_tokens: int
    with_types: bool
    pad_id: int
    pads_left: bool
    unknown: str | None
    prompts: dict[str, str]
    default_prompt_name: str | None
    fingerprint: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class CachedGraph:
    """A checked graph on disk."""

    folder: Path
    facts: GraphFacts

    @property
    def model_path(self) -> Path:
        """The graph's XML; its weights lie beside it."""
        return self.folder / "model.xml"

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's own file."""
        return self.folder / "tokenizer.json"


def cache_root() -> Path:
    """Where graphs are kept."""
    return cache_folder() / "graphs"


def graph_key(folder: Path) -> str:
    """A key for the model in `folder`: its files' names, sizes and times, with the versions that read them."""
    facts: list[Any] = [_FORMAT, version("openvino"), version("asyncembed"), str(folder)]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in _IGNORED and path.name not in _IGNORED:
            status = path.stat()
            facts.append([path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def load_graph(key: str) -> CachedGraph | None:
    """The graph of that key; None if there is none or it is damaged (it is removed then)."""
    folder = cache_root() / key
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        for name in _FILES:
            if _digest(folder / name) != meta["digests"][name]:
                raise ValueError(f"{name} is damaged")
        return CachedGraph(folder, GraphFacts(**meta["facts"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the cached graph in %s is unusable (%s); it is made anew", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def store_graph(key: str, facts: GraphFacts, tokenizer: str, save: Callable[[Path], None]) -> CachedGraph | None:
    """Keep a graph; None if the cache cannot be written.

    Args:
        key: From `graph_key`.
        facts: What must be known besides.
        tokenizer: The tokenizer's JSON.
        save: Writes `model.xml` and `model.bin` to the path it is given.
    """
    target = cache_root() / key
    making = target.with_name(f".{key}.{os.getpid()}")
    try:
        making.mkdir(parents=True)
        save(making / "model.xml")
        (making / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        digests = {name: _digest(making / name) for name in _FILES}
        (making / "meta.json").write_text(json.dumps({"digests": digests, "facts": asdict(facts)}), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        making.rename(target)
    except OSError as error:
        logger.warning("the graph cannot be kept for the next start: %s", error)
        return None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return CachedGraph(target, facts)


def known_failure(key: str) -> str | None:
    """Why the graph of that key could not be made; None if nothing is known against it."""
    try:
        return (cache_root() / f"{key}.failed").read_text(encoding="utf-8")
    except OSError:
        return None


def remember_failure(key: str, reason: str) -> None:
    """Do not try again with the same files and versions."""
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs the attempt again
        cache_root().mkdir(parents=True, exist_ok=True)
        (cache_root() / f"{key}.failed").write_text(reason, encoding="utf-8")


def forget_failure(key: str) -> None:
    """It was made after all."""
    with contextlib.suppress(OSError):
        (cache_root() / f"{key}.failed").unlink(missing_ok=True)


def resolve_prompt(facts: GraphFacts, prompt: str | None, prompt_name: str | None) -> str | None:
    """The prompt that the options mean; None if the model has none of that name."""
    if prompt is not None:
        return prompt
    name = prompt_name if prompt_name is not None else facts.default_prompt_name
    if name is None:
        return ""
    prompts: Mapping[str, str] = facts.prompts
    return (prompts[name] or "") if name in prompts else (None if prompt_name is not None else "")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
