"""Jobs run in processes of their own, as `python -m tests.children WHAT …`: each prints a JSON object."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import psutil

from asyncembed import Batch, EmbedOptions, Encoder, embed_stream, load_encoder
from asyncembed.encoders import FloatMatrix
from asyncembed.records import Chunk
from tests.fakes import FakeEncoder

MIB = 1 << 20


def row_batch(n_rows: int, length: int) -> Batch:
    """Rows of so many tokens."""
    ids = np.full(length, 1000, np.int32)
    return Batch(tuple(Chunk(owner, 0, "x", 0, ids, length - 2) for owner in range(n_rows)))


def long_texts(n_texts: int) -> Iterator[str]:
    """Distinct texts of about 250 tokens, each one chunk: batches of a hundred rows or so."""
    for number in range(n_texts):
        yield f"{number} " + "the boat left the harbour before the storm. " * 27


class Killed:
    """The real model; a batch larger than `kill_above` padded tokens ends the process as the kernel would."""

    def __init__(self, encoder: Encoder, kill_above: int) -> None:
        self.name, self.device, self.backend, self.dtype = encoder.name, encoder.device, encoder.backend, encoder.dtype
        self.dim, self.max_tokens, self.prompt, self.slots = encoder.dim, encoder.max_tokens, encoder.prompt, 1
        self._encoder = encoder
        self._kill_above = kill_above

    def tokenizer(self) -> Any:
        return self._encoder.tokenizer()

    def start(self, batch: Batch) -> Any:
        if batch.padded_tokens > self._kill_above:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._encoder.start(batch)

    def finish(self, handle: Any) -> FloatMatrix:
        return self._encoder.finish(handle)

    def free_memory(self) -> None:
        self._encoder.free_memory()

    def fingerprint(self) -> Mapping[str, Any]:
        return self._encoder.fingerprint()

    def made_with(self) -> Mapping[str, Any]:
        return self._encoder.made_with()


async def run(encoder: Encoder, n_texts: int, **options: Any) -> dict[str, Any]:
    """A job without a folder, and its numbers."""
    async with embed_stream(long_texts(n_texts), model=encoder, save_path=None, **options) as stream:
        errors = {record.error async for record in stream}
    return {**stream.summary.as_dict(), "errors": sorted(filter(None, errors))}


def killed(kill_above: int, n_texts: int) -> dict[str, Any]:
    """A job whose large batches kill it."""
    encoder = load_encoder(EmbedOptions(device="cpu", backend="openvino"))
    return asyncio.run(run(Killed(encoder, kill_above), n_texts))


class KilledByLength(Killed):
    """The real model; a batch with a row longer than `kill_above` tokens ends the process as the kernel would."""

    def start(self, batch: Batch) -> Any:
        if batch.longest > self._kill_above:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._encoder.start(batch)


def deadly(folder: str, kill_above: int, token_limit: int, chunk_size: int) -> dict[str, Any]:
    """A job of short texts around a long one, whose length kills it; 0 stands for an option that is not given."""
    encoder = KilledByLength(load_encoder(EmbedOptions(device="cpu", backend="openvino")), kill_above)
    short = [f"{number} boats" for number in range(8)]
    texts = [*short[:4], next(long_texts(1)), *short[4:]]
    options = {"token_limit": token_limit or None, "chunk_size": chunk_size or None}

    async def job() -> dict[str, Any]:
        async with embed_stream(texts, model=encoder, save_path=folder, **options) as stream:
            errors = {record.error async for record in stream}
        return {**stream.summary.as_dict(), "errors": sorted(filter(None, errors))}

    return asyncio.run(job())


def exhausted(backend: str, n_mib: int, n_texts: int, n_bytes: int = 0) -> dict[str, Any]:
    """A job with `n_mib` MiB of address space more than the loaded model takes, with the padded tokens of its `largest`
    batch, whatever became of it.

    `n_bytes` is the bound itself, where an earlier job's is wanted: what is remembered is of a machine of that size.
    The model says that it runs on an accelerator: the first limit of one, 16,384 tokens, is what does not fit.
    """
    encoder = load_encoder(EmbedOptions(device="cpu", backend=backend))  # type: ignore[arg-type]
    for _ in range(2):
        encoder.finish(encoder.start(row_batch(4, 256)))
    tokenizer = encoder.tokenizer()
    tokenizer.tokenize(list(long_texts(64)))
    encoder.device = "accelerator:0"
    n_bytes = n_bytes or psutil.Process().memory_info().vms + n_mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    sizes: list[int] = []
    start = encoder.start

    def noting(batch: Batch) -> Any:
        sizes.append(batch.padded_tokens)
        return start(batch)

    encoder.start = noting  # type: ignore[method-assign]
    return {**asyncio.run(run(encoder, n_texts, max_memory_usage=64 * MIB)), "largest": max(sizes), "bound": n_bytes}


class Constant(Killed):
    """The real tokenizer, and vectors at once: nothing but the pipeline takes memory."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, 0)

    def start(self, batch: Batch) -> Any:
        return len(batch.chunks)

    def finish(self, handle: Any) -> FloatMatrix:
        return np.ones((handle, self.dim), np.float32)


def held(n_texts: int, n_chars: int, max_bytes: int) -> dict[str, Any]:
    """A job whose source is far faster than its model: how far its peak was above the loaded model."""
    encoder = Constant(load_encoder(EmbedOptions(device="cpu", backend="openvino")))
    sentence = "the boat left the harbour before the storm. "
    texts = (f"{number} " + sentence * (n_chars // len(sentence)) for number in range(n_texts))
    before = psutil.Process().memory_info().rss

    async def job() -> dict[str, Any]:
        async with embed_stream(texts, model=encoder, save_path=None, max_memory_usage=max_bytes) as stream:
            async for _ in stream:
                pass
        return stream.summary.as_dict()

    found = asyncio.run(job())
    return {**found, "above_model": found["peak_rss_bytes"] - before}


async def grown(n_before: int, n_texts: int) -> dict[str, int]:
    """A job of so many short texts: how far the process grew after the first `n_before`.

    The budget is small, so that what happens to be in flight at either moment is no more than noise.
    """
    texts = (f"text number {number} of the stream" for number in range(n_texts))
    n = before = 0
    async for _ in embed_stream(texts, model=FakeEncoder(dim=16), save_path=None, max_memory_usage="16MB"):
        n += 1
        if n == n_before:
            before = psutil.Process().memory_info().rss
    return {"n_texts": n, "grown_bytes": psutil.Process().memory_info().rss - before}


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "killed":
        print(json.dumps(killed(int(arguments[0]), int(arguments[1]))))
    elif what == "deadly":
        print(json.dumps(deadly(arguments[0], *map(int, arguments[1:]))))
    elif what == "grown":
        print(json.dumps(asyncio.run(grown(*map(int, arguments)))))
    elif what == "held":
        print(json.dumps(held(*map(int, arguments))))
    else:
        print(json.dumps(exhausted(arguments[0], *map(int, arguments[1:]))))
