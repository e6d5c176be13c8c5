"""Whether a model is one that makes one dense vector of a text: what else looks like a model is refused by its kind."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from asyncembed.errors import ModelError

logger = logging.getLogger("asyncembed")

_KIND = "SentenceTransformer"
_MAKES = {
    "SparseEncoder": "sparse vectors",
    "CrossEncoder": "scores of pairs of texts",
    "MultiVectorEncoder": "a vector of each token",
    "ColBERT": "a vector of each token",
}
_MODEL_FILES = ("modules.json", "config.json", "adapter_config.json")


def check_kind(folder: Path, model: str | os.PathLike[str]) -> None:
    """Refuse a folder of another kind, whose weights sentence-transformers would load and pool all the same.

    Raises:
        ModelError: It holds no model, or one that makes no embeddings of texts.
    """
    if not any((folder / name).is_file() for name in _MODEL_FILES):
        raise ModelError(f"there is no model in {folder}: it holds none of {', '.join(_MODEL_FILES)}")
    _check(os.fspath(model), _settings(folder, "config_sentence_transformers.json").get("model_type"))
    if (folder / "modules.json").is_file():
        if b'"pylate.' in (folder / "modules.json").read_bytes():  # named before the loader takes it for unknown code
            _check(os.fspath(model), "ColBERT")
        return
    architectures = _settings(folder, "config.json").get("architectures") or [""]
    if str(architectures[0]).endswith("ForSequenceClassification"):
        raise ModelError(
            f"the model {os.fspath(model)!r} is a classifier or reranker ({architectures[0]}): it makes scores, and no "
            "embeddings of texts"
        )
    logger.warning(
        "the model %s does not say how tokens' vectors become one of the text; sentence-transformers' default is used",
        os.fspath(model),
    )


def check_live(model: Any) -> None:
    """Refuse a live model of another kind, and say it of one whose own `encode` does something else.

    Raises:
        ModelError: It makes no dense vectors.
    """
    _check(type(model).__name__, getattr(model, "model_type", None))
    if not getattr(model.encode, "__module__", "").startswith("sentence_transformers."):
        logger.warning(
            "%s has an encode() of its own, which is not used: its modules are given token ids, and what it does to "
            "texts or vectors besides is left out",
            type(model).__name__,
        )


def _check(name: str, kind: Any) -> None:
    if kind not in (None, _KIND):
        makes = _MAKES.get(str(kind), "something else")
        raise ModelError(f"the model {name!r} is a {kind}: it makes {makes}, and not one dense vector of a text")


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """A file of settings; nothing if there is none, or it is damaged: then loading says so."""
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
