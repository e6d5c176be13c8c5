"""The benchmark's own promises: its corpora, its arithmetic, and a tiny run of the real thing. No speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from asyncembed import Text, read_texts
from tests.benchmarks import corpora
from tests.benchmarks.contestants import load_rows, save_rows
from tests.benchmarks.measure import Turn, digest, interleaved, median_ratio
from tests.core.minilm import fast_tokenizer

ROOT = Path(__file__).parents[2]
N_TEXTS = 300


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_corpus_built_twice_is_the_same_without_repeats(name: str) -> None:
    texts = corpora.build(name, N_TEXTS)
    assert texts == corpora.build(name, N_TEXTS)
    assert len(set(texts)) == len(texts) == N_TEXTS


def test_corpus_docs_has_mixed_lengths_and_short_has_about_sixteen_tokens() -> None:
    counts = {
        name: np.array([one.n_content for one in fast_tokenizer().tokenize(corpora.build(name, N_TEXTS))])
        for name in corpora.CORPORA
    }
    assert 10 <= counts["short"].mean() <= 22
    assert counts["short"].max() < 256
    low, middle, high = np.percentile(counts["docs"], [10, 50, 95])
    assert low < 20 < middle < 120 < 256 < high


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_corpus_written_is_what_asyncembed_reads(name: str, tmp_path: Path) -> None:
    texts = corpora.build(name, N_TEXTS)
    file = corpora.write(name, texts, tmp_path)
    assert [item.text for item in read_texts(file) if isinstance(item, Text)] == texts
    assert corpora.read(file) == texts


def test_corpus_larger_than_the_installation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_files", lambda: [Path(corpora.__file__)])
    with pytest.raises(ValueError, match=r"different texts for 'docs', not 1,000"):
        corpora.build("docs", 1000)


def test_recorded_batches_come_back_as_they_were(tmp_path: Path) -> None:
    batches = [[np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32)], [np.arange(2, dtype=np.int32)]]
    save_rows(batches, tmp_path / "rows.npz")
    found = load_rows(tmp_path / "rows.npz")
    assert [[row.tolist() for row in rows] for rows in found] == [[[0, 1, 2], [0, 1, 2, 3, 4]], [[0, 1]]]


def test_turns_alternate_and_ratios_are_taken_within_rounds() -> None:
    assert list(interleaved(["a", "b"], 2)) == ["a", "b", "a", "b"]
    assert median_ratio([2, 20, 30], [1, 10, 10]) == 2  # the machine was ten times slower in the later rounds
    turns = {"encode": [Turn(4.0)], "asyncembed torch float32": [Turn(2.0)], "bare loop torch float32": [Turn(1.0)]}
    encode, job, bare = digest(turns, n_texts=8, n_tokens=80)
    assert (job["texts_per_second"], job["tokens_per_second"]) == (4, 40)
    assert (encode["times_encode"], job["times_encode"], bare["times_encode"]) == (1, 2, 4)
    assert (encode["part_of_bare_loop"], job["part_of_bare_loop"], bare["part_of_bare_loop"]) == (None, 0.5, None)


def test_tiny_benchmark_writes_its_figures(tmp_path: Path) -> None:
    contestants = ("encode", "asyncembed torch float32")
    chosen = [argument for name in contestants for argument in ("--contestant", name)]
    sizes = ["--corpus", "short", "--texts", "20", "--rounds", "1"]
    output = ["--json", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--compare", "--resume", *sizes, *chosen, *output],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"version", "machine", "settings", "compare", "resume"} == set(results)
    corpus = results["compare"]["short"]
    assert corpus["n_texts"] == 20
    rows = {row["name"]: row for row in corpus["rows"]}
    assert list(rows) == [*contestants, "bare loop torch float32"]
    for row in rows.values():
        assert len(row["seconds"]) == 1
        assert row["texts_per_second"] > 0
        assert row["tokens_per_second"] > row["texts_per_second"]
        assert 0 <= row["padding"] < 5
        assert row["times_encode"] > 0
    job = rows["asyncembed torch float32"]
    assert job["part_of_bare_loop"] > 0
    assert 0 < job["first_s"] <= job["median_s"]
    assert rows["bare loop torch float32"]["batches"] == job["batches"]
    assert [len(row["seconds"]) for row in results["resume"]] == [1, 1]
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left - {"chart.png"} == {"results.json"}


def test_contestant_that_is_unknown_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--texts", "5", "--contestant", "nobody", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no contestant 'nobody' here; there are: encode, asyncembed torch float32" in done.stderr
