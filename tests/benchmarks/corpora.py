"""Texts to measure with: docstrings of the installed Python packages, found without importing any.

The same installation gives the same corpus: files are taken in the order of a hash of their paths until there are
texts enough, repeats are dropped, and the texts are put in the order of their own hashes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MIN_CHARACTERS = 12
MIN_WORDS_OF_LINE = 6
"""First lines shorter than this are names more than sentences; with it they have 16 tokens on average."""

_SKIPPED = {"__pycache__", "site-packages", "dist-packages"}


class Corpus(NamedTuple):
    """How a corpus is made from docstrings, and kept.

    Attributes:
        cut: Makes a text of a docstring; None if it gives none.
        suffix: Of its file: texts with line breaks need JSON.
    """

    cut: Callable[[str], str | None]
    suffix: str


def _whole(docstring: str) -> str | None:
    return docstring if len(docstring) >= MIN_CHARACTERS else None


def _first_line(docstring: str) -> str | None:
    line = docstring.splitlines()[0].strip()
    return line if len(line.split()) >= MIN_WORDS_OF_LINE else None


CORPORA = {"docs": Corpus(_whole, ".json"), "short": Corpus(_first_line, ".txt")}


def build(name: str, n_texts: int) -> list[str]:
    """A corpus of exactly `n_texts` different texts.

    Args:
        name: `docs`, docstrings of mixed lengths, or `short`, their first lines.
        n_texts: How many.

    Raises:
        ValueError: The installed packages do not have so many.
    """
    cut = CORPORA[name].cut
    found: set[str] = set()
    for file in _files():
        if len(found) >= n_texts:
            break
        found.update(text for docstring in _docstrings(file) if (text := cut(docstring)) is not None)
    if len(found) < n_texts:
        raise ValueError(f"the installed packages have {len(found):,} different texts for {name!r}, not {n_texts:,}")
    return sorted(found, key=_hash)[:n_texts]


def write(name: str, texts: list[str], folder: Path) -> Path:
    """Write a corpus as a file that `asyncembed` reads, and return its path."""
    corpus = CORPORA[name]
    path = folder / f"{name}{corpus.suffix}"
    lines = json.dumps(texts, ensure_ascii=False, indent=0) if corpus.suffix == ".json" else "\n".join(texts)
    path.write_text(lines + "\n", encoding="utf-8", newline="\n")
    return path


def read(path: Path) -> list[str]:
    """The texts of a file that `write` made, by the shortest way."""
    content = path.read_text(encoding="utf-8")
    return list(json.loads(content)) if path.suffix == ".json" else content.rstrip("\n").split("\n")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _files() -> list[Path]:
    """All Python files of the standard library and of the installed packages, shuffled by their relative paths."""
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    found: dict[str, Path] = {}
    for root in sorted(roots):
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED]
            for name in files:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return [found[key] for key in sorted(found, key=lambda key: hashlib.sha256(os.fsencode(key)).digest())]


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file that are text; none of one that cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node) or "").strip()
            if any(character.isascii() and character.isalpha() for character in docstring) and _is_utf8(docstring):
                yield docstring


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
