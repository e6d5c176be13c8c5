"""Texts that cannot be embedded each give one record with the reason; their neighbours never notice."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import (
    AsyncEmbedError,
    EmbeddingGenerator,
    ModelError,
    Text,
    embed_stream,
    open_embeddings,
    read_texts,
    text_id,
)
from tests.cli.running import ENVIRONMENT, run
from tests.conftest import all_tasks_done
from tests.fakes import FakeEncoder
from tests.poison import BLANK, DEAD, FAILING, GOOD, HUGE, NO_TOKENS, SURROGATES, UNKNOWN, Poisonable

pytestmark = pytest.mark.usefixtures("no_leftovers")

PLAIN = [f"an ordinary sentence, number {n}" for n in range(60)]
REASONS = {**FAILING, **dict.fromkeys(BLANK, NO_TOKENS), **dict.fromkeys(SURROGATES, "lone surrogate")}


@pytest.fixture(scope="module")
def undisturbed(encoder: Any) -> dict[str, np.ndarray]:
    """The vectors of a run without a bad text."""
    import asyncio

    return asyncio.run(embed_stream([*PLAIN, *GOOD], model=encoder, save_path=None)._collect())


@pytest.fixture
def mixed() -> list[str]:
    texts = [*PLAIN, *GOOD, *REASONS]
    random.Random(4).shuffle(texts)
    return texts


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def check_unharmed(vectors: Any, undisturbed: dict[str, np.ndarray]) -> None:
    for text, expected in undisturbed.items():
        assert cosine(vectors[text], expected) >= 0.999999, text[:50]


async def test_every_poison_gives_one_record_and_its_neighbours_are_unharmed(
    encoder: Any, mixed: list[str], undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    mixed.insert(40, HUGE)
    stream = embed_stream(mixed, model=Poisonable(encoder), save_path=tmp_path)
    records = [record async for record in stream]
    assert sorted(record.index for record in records) == list(range(len(mixed)))
    by_text = {record.text: record for record in records}
    for text, reason in (*REASONS.items(), (HUGE, UNKNOWN)):
        assert by_text[text].embedding is None
        assert reason in str(by_text[text].error), (text[:50], by_text[text].error)
    check_unharmed({text: record.embedding for text, record in by_text.items()}, undisturbed)
    assert (stream.summary.failed, stream.summary.embedded) == (len(REASONS) + 1, len(undisturbed))
    stored = open_embeddings(tmp_path)
    check_unharmed({one.text: one.embedding for one in stored}, undisturbed)
    assert set(stored.failures()) == {text_id(text) for text in (*REASONS, HUGE)}
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_bytes().splitlines()]
    assert {line["text"] for line in errors} == {*REASONS, HUGE}


async def test_failed_texts_are_tried_again_by_the_next_run(encoder: Any, mixed: list[str], tmp_path: Path) -> None:
    texts = [text for text in mixed if len(text) < 1000]
    await embed_stream(texts, model=Poisonable(encoder), save_path=tmp_path).run()
    summary = await embed_stream(texts, model=encoder, save_path=tmp_path).run()
    marked = sum("MARK-" in text for text in texts)
    assert (summary.embedded, summary.cached + summary.failed) == (marked, len(texts) - marked)


def test_generator_gives_none_for_the_poison_and_vectors_for_its_neighbours(
    encoder: Any, mixed: list[str], undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    found = EmbeddingGenerator(Poisonable(encoder), save_path=tmp_path)(mixed)
    assert {text for text, vector in found.items() if vector is None} == set(REASONS)
    check_unharmed(found, undisturbed)


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([text] for text in texts)


def write_json(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps(texts))


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_command_line_notes_the_poison_of_a_file_and_saves_the_rest(
    mixed: list[str], undisturbed: dict[str, np.ndarray], suffix: str, tmp_path: Path
) -> None:
    # Without the marked texts, as the program has the real model without a wrapper; a CSV file holds no surrogate.
    texts = [text for text in mixed if "MARK-" not in text and (suffix == "json" or text not in SURROGATES)]
    texts = [text.removeprefix("\ufeff") if n == 0 else text for n, text in enumerate(texts)]
    texts += [HUGE] if suffix == "csv" else []
    path = tmp_path / f"texts.{suffix}"
    (write_csv if suffix == "csv" else write_json)(path, texts)
    done = run(path, "-o", "out", "--json", folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    failing = {text for text in texts if text in (*REASONS, HUGE) and text not in BLANK}
    assert (summary["texts"], summary["failed"]) == (len(texts) - len(BLANK), len(failing))
    assert summary["skipped"] == len(BLANK)
    stored = open_embeddings(tmp_path / "out")
    check_unharmed({one.text: one.embedding for one in stored}, undisturbed)
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_bytes().splitlines()]
    assert {line["text"] for line in errors} == failing
    assert all(line["reason"] and line["place"].startswith(str(path)) for line in errors)


async def test_keys_and_texts_that_look_like_paths_never_name_a_file(tmp_path: Path) -> None:
    odd = ["../../etc/passwd", "/etc/passwd", "..", "a/b\\c", "nul\0key", "\ud800", "x" * 5000, "con", "~", "$HOME"]
    inner = tmp_path / "a" / "b" / "data"
    source = [Text(f"text of {key!r}", key=key) for key in odd] + [Text(text, key=None) for text in odd[:4]]
    await embed_stream(source, model=FakeEncoder(), save_path=inner)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    records = {f"a/b/data/embeddings_data/{text_id(item.text)}.json" for item in source}
    assert names - {"a/b/data/.lock"} == records | {"a/b/data/embeddings_index.json", "a/b/data/ledger.sqlite"}
    stored = open_embeddings(inner)
    assert {key: stored.by_key(key).text for key in odd} == {key: f"text of {key!r}" for key in odd}


async def endless_around(text: str) -> AsyncIterator[str]:
    for number in range(10**9):
        yield text if number == 900 else f"an ordinary text, number {number}"


def fragile(words: str) -> FakeEncoder:
    def dies(batch: Any) -> None:
        if any("MARK-DEAD" in chunk.text for chunk in batch.chunks):
            raise RuntimeError(words)

    return FakeEncoder(on_batch=dies)


@pytest.mark.parametrize(
    ("face", "words"),
    [*((face, DEAD[0]) for face in ("await", "iterate", "run", "block", "generator")), *(("run", w) for w in DEAD[1:])],
)
async def test_dead_device_stops_every_face_loudly_with_all_that_was_finished_saved(
    face: str, words: str, tmp_path: Path
) -> None:
    encoder = fragile(words)
    if face == "generator":
        texts = [f"an ordinary text, number {n}" for n in range(900)] + ["MARK-DEAD"]
        with pytest.raises(ModelError, match=words):
            EmbeddingGenerator(encoder, save_path=tmp_path)(texts)
    else:
        # The budget bounds how far an endless source runs ahead while the odd text waits for its turn.
        stream = embed_stream(endless_around("MARK-DEAD"), model=encoder, save_path=tmp_path, max_memory_usage="1MB")
        with pytest.raises(ModelError, match=words):
            await use(stream, face)
        await all_tasks_done()
        assert stream._job.admission.statistics()[:1] == (0,)
    assert len(open_embeddings(tmp_path)) == encoder.rows > 0
    summary = await embed_stream(["a next run"], model=FakeEncoder(), save_path=tmp_path).run()  # the lock is free
    assert summary.embedded == 1


async def use(stream: Any, face: str) -> None:
    """Use a stream to its end in one of its forms."""
    if face == "await":
        await stream
    elif face == "run":
        await stream.run()
    elif face == "iterate":
        async for _ in stream:
            pass
    else:
        async with stream:
            async for _ in stream:
                pass


@pytest.mark.parametrize("face", ["await", "iterate", "run", "block"])
@pytest.mark.parametrize(
    "place",
    [
        "asyncembed.engine.work.Work.add",
        "asyncembed.engine.heap.ChunkHeap.take",
        "asyncembed.engine.chunking.Chunker._chunk_one",
    ],
)
async def test_bug_of_our_own_stops_every_face_loudly_with_all_that_was_finished_saved(
    face: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth call of one of our own functions breaks."""
    from pydoc import locate

    owner, name = place.rsplit(".", 1)
    original, n_calls = getattr(locate(owner), name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == (5 if name == "take" else 600):
            raise KeyError("a bug")
        return original(*args, **kwargs)

    monkeypatch.setattr(place, broken)
    encoder = FakeEncoder()
    stream = embed_stream(endless_around("nothing"), model=encoder, save_path=tmp_path)
    with pytest.raises(KeyError, match="a bug"):
        await use(stream, face)
    await all_tasks_done()
    assert stream._job.admission.statistics()[:1] == (0,)
    monkeypatch.undo()
    n_saved = len(open_embeddings(tmp_path))
    assert encoder.rows - 4 * 256 <= n_saved <= encoder.rows
    assert (await embed_stream(["next"], model=FakeEncoder(), save_path=tmp_path).run()).embedded == 1


DYING = """
import sys
from asyncembed.cli import main
from asyncembed.encoders.openvino_encoder import OpenVinoEncoder
from asyncembed.encoders.torch_encoder import TorchEncoder

n_calls = 0

def dying(finish):
    def finish_twice(self, handle):
        global n_calls
        n_calls += 1
        if n_calls == 3:
            raise ERROR
        return finish(self, handle)
    return finish_twice

for kind in (OpenVinoEncoder, TorchEncoder):
    kind.finish = dying(kind.finish)
sys.exit(main())
"""


def test_command_line_leaves_with_3_and_what_was_finished_is_saved(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(PLAIN))
    script = DYING.replace("ERROR", "RuntimeError('CUDA error: device-side assert triggered')")
    done = subprocess.run(
        [sys.executable, "-c", script, "texts.txt", "-o", "out", "--batch-size", "8", "-q"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "device-side assert" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(open_embeddings(tmp_path / "out")) >= 16


async def test_model_that_gives_nothing_but_nan_fails_every_text_with_that_reason(encoder: Any) -> None:
    with pytest.raises(AsyncEmbedError, match=r"none of the 40 texts could be embedded.*NaN"):
        await embed_stream([f"{n} MARK-NAN" for n in range(40)], model=Poisonable(encoder), save_path=None)


def test_reader_of_a_file_with_ten_megabytes_in_a_line_gives_it_whole(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 10_000_000 + "\nshort\n")
    assert [len(item.text) for item in read_texts(tmp_path / "long.txt")] == [10_000_000, 5]
