"""The steps in a loop, and what a folder holds then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncembed import EmbeddingGenerator


def by_steps(generator: EmbeddingGenerator, items: Iterator[Any]) -> dict[str, list[float] | None]:
    """The loop of the class's own documentation."""
    while generator.fill_texts(items) or generator.n_waiting:
        chunks = generator.find_best_chunks()
        try:
            generator.embed(chunks)
        except Exception as error:
            generator.fail(chunks, error)
        else:
            generator.succeed(chunks)
        generator.save_data()
        generator.remove_completed_texts()
    return generator.load_average_embeddings_with_fallback()


def files(folder: Path) -> dict[str, bytes]:
    """The per-text files."""
    return {path.name: path.read_bytes() for path in (folder / "embeddings_data").iterdir()}


def errors(folder: Path) -> list[dict[str, Any]]:
    """The lines of `errors.jsonl`, in the order of the input; none if there is no such file."""
    path = folder / "errors.jsonl"
    lines = path.read_text(encoding="utf-8", errors="surrogatepass").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return sorted(found, key=lambda line: (line.get("index", -1), str(line)))


def contents(folder: Path) -> tuple[Any, ...]:
    """All that a run leaves in its folder."""
    return files(folder), (folder / "embeddings_index.json").read_bytes(), errors(folder)
