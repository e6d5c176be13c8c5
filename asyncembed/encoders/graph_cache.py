"""Checked graphs in the user's cache folder, so that the next start needs neither torch nor sentence-transformers.

An entry is a folder named by a key over the contents of the model's files and the versions that made it. It appears
whole or not at all (written beside and renamed), and its files are checked against their digests when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from asyncembed.cache import cache_folder
from asyncembed.encoders.weights import contents_hash, file_hash

logger = logging.getLogger("asyncembed")

MAX_BYTES = 8 << 30
"""What all graphs may take: above it the least recently used are removed."""

READING_S = 60.0
"""Seconds after its last use in which a graph may still be read."""

_FORMAT = 3  # those of format 1 may have been saved under a locale that breaks their numbers
_FILES = ("model.xml", "model.bin", "tokenizer.json")
_MAKERS = ("openvino", "asyncembed", "torch", "transformers", "sentence-transformers", "tokenizers")
_DAY_S = 86_400


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
        cuts_left: The model's own truncation keeps the end of a long text.
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
    cuts_left: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    fingerprint: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class CachedGraph:
    """A checked graph on disk.

    Attributes:
        folder: Holds its files.
        facts: What must be known besides.
        is_temporary: It is for this process alone, and removed with this object.
    """

    folder: Path
    facts: GraphFacts
    is_temporary: bool = False

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


def makers() -> dict[str, str]:
    """The versions on which a graph depends."""
    return {name: version(name) for name in _MAKERS}


def graph_key(folder: Path) -> str:
    """A key for the model in `folder`: the contents of its files, with the versions that read them."""
    facts = [_FORMAT, makers(), contents_hash(folder)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def load_graph(key: str) -> CachedGraph | None:
    """The graph of that key; None if there is none or it is damaged (it is removed then)."""
    folder = cache_root() / key
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        for name in _FILES:
            if file_hash(folder / name) != meta["digests"][name]:
                raise ValueError(f"{name} is damaged")
        facts = GraphFacts(**meta["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if folder.exists():
            logger.warning("the cached graph in %s is unusable (%s); it is made anew", folder, error)
            _remove(folder)
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # it was used just now
    return CachedGraph(folder, facts)


def keep_graph(key: str | None, source: Path | None, tokenizer: str, save: Callable[[Path], GraphFacts]) -> CachedGraph:
    """Keep a graph; in a temporary folder, for this process only, if it has no key or the cache cannot be written."""
    if key is not None:
        try:
            return _keep(key, source, tokenizer, save)
        except OSError as error:
            logger.warning(
                "the graph cannot be kept in %s for the next start, which converts the model again (%s); "
                "this run uses a temporary folder", cache_root(), str(error),  # its frames would keep the model alive
            )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="asyncembed-graph-"))
    try:
        graph = CachedGraph(folder, _fill(folder, tokenizer, save), is_temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(graph, shutil.rmtree, folder, ignore_errors=True)
    return graph


def _keep(key: str, source: Path | None, tokenizer: str, save: Callable[[Path], GraphFacts]) -> CachedGraph:
    """Make an entry beside its place, and rename it, unless another process was faster."""
    root = cache_root()
    target, making = root / key, root / f".{key}.{os.getpid()}.{threading.get_ident()}"
    made_for = {"folder": str(source), "versions": makers()}
    try:
        making.mkdir(parents=True)
        _prune(target, made_for)  # also now: a conversion that is killed at each start leaves something each time
        facts = _fill(making, tokenizer, save)
        digests = {name: file_hash(making / name) for name in _FILES}
        meta = {"digests": digests, "facts": asdict(facts), "made_for": made_for}
        (making / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            making.rename(target)
        except OSError:
            if (theirs := load_graph(key)) is not None:
                return theirs
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    _prune(target, made_for)
    return CachedGraph(target, facts)


def _fill(folder: Path, tokenizer: str, save: Callable[[Path], GraphFacts]) -> GraphFacts:
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return save(folder / "model.xml")


def _prune(current: Path, made_for: Mapping[str, object]) -> None:
    """Remove what is of no more use.

    That is: what killed conversions left a day ago, the model's graph before its files changed, and above `MAX_BYTES`
    the least recently used. Who is running one of them goes on: its files are read or mapped. One that was used within
    the last minute stays: somebody may be reading it.
    """
    others: list[tuple[float, Path]] = []
    for folder in cache_root().iterdir():
        with contextlib.suppress(OSError):  # removed by another process just now
            last_used = folder.stat().st_mtime
            if folder == current or time.time() - last_used < READING_S:
                continue
            if folder.name.startswith("."):
                is_useless = time.time() - last_used > _DAY_S
            else:
                is_useless = folder.is_dir() and _made_for(folder) in (None, made_for)
            if is_useless:
                _remove(folder)
            elif folder.is_dir():
                others.append((last_used, folder))
    n_bytes = _size(current)
    for _, folder in sorted(others, reverse=True):
        n_bytes += _size(folder)
        if n_bytes > MAX_BYTES:
            _remove(folder)


def _made_for(folder: Path) -> object:
    try:
        return json.loads((folder / "meta.json").read_bytes()).get("made_for")
    except (OSError, ValueError, AttributeError):
        return None


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _remove(folder: Path) -> None:
    """Remove an entry, which disappears as a whole."""
    with contextlib.suppress(OSError):  # in use, where that keeps it, or removed by another process
        doomed = folder.rename(folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.gone"))
        shutil.rmtree(doomed, ignore_errors=True)


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
