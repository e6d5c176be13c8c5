"""Embeddings in a plain script, without asyncio: `EmbeddingGenerator`.

Run it from the root of the repository: .venv/bin/python examples/embedding_generator_example.py
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from asyncembed import EmbeddingGenerator

NOTES = Path(__file__).with_name("notes.csv")


def texts() -> Iterator[str]:
    """The first column of the file. Any iterator will do, also one that is too large for memory."""
    with NOTES.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            yield row[0]


def main() -> None:
    # The model is a name, a path, or a SentenceTransformer that you have loaded already; the settings are
    # the keyword arguments of its `encode`.
    generator = EmbeddingGenerator(
        "all-MiniLM-L6-v2",
        {"batch_size": 32, "normalize_embeddings": True},
        save_path="data/examples-normalized",
    )

    # A dictionary: text -> list of floats, or None for a text that could not be embedded. Texts longer than
    # the model takes are split, and the vectors of their pieces averaged. A second run reads what is saved.
    embeddings = generator(texts())

    failed = [text for text, embedding in embeddings.items() if embedding is None]
    print(f"{len(embeddings)} different texts, {len(failed)} without an embedding")
    text, embedding = next(iter(embeddings.items()))
    if embedding is not None:
        print(f"{text!r}\n  {len(embedding)} numbers: {', '.join(f'{number:.3f}' for number in embedding[:5])}, …")


if __name__ == "__main__":
    main()
