"""Which notes answer a question? Similarity search over examples/notes.csv with `embed_stream`.

Run it from the root of the repository: .venv/bin/python examples/embed_stream_example.py
"""

import asyncio
from pathlib import Path

import numpy as np

from asyncembed import embed_stream, read_texts

NOTES = Path(__file__).with_name("notes.csv")
QUESTION = "Why does my bicycle make noises when I brake?"


async def main() -> None:
    # 1. Embed the file. Results arrive one by one, as they are finished, and are saved below data/examples:
    #    run this script a second time, and every record comes from there (`record.cached`).
    notes: dict[str, np.ndarray] = {}
    async with embed_stream(read_texts(NOTES), save_path="data/examples") as stream:
        async for record in stream:
            if record.embedding is None:  # one text that fails does not end the job
                print(f"no embedding for {record.text[:40]!r}: {record.error}")
            else:
                notes[record.text] = record.embedding
    print(stream.summary)

    # 2. Embed the question. To await the stream instead gives all vectors at once, text -> array of float32;
    #    save_path=None writes nothing.
    question = (await embed_stream([QUESTION], save_path=None))[QUESTION]

    # 3. Compare: the cosine of two vectors is 1 for the same direction, around 0 for unrelated texts.
    texts = list(notes)
    matrix = np.stack([notes[text] for text in texts])
    cosines = matrix @ question / (np.linalg.norm(matrix, axis=1) * np.linalg.norm(question))

    print(f"\n{QUESTION}")
    for i in np.argsort(-cosines)[:5]:
        print(f"  {cosines[i]:.2f}  {texts[i][:90]!r}")


asyncio.run(main())
