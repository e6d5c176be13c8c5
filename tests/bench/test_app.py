"""The benchmark of many clients: its arithmetic, and a tiny run of the real thing. No speed is asserted."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.load import Load, against, arrivals, closed_loop, digest, n_requests, slice_of

ROOT = Path(__file__).parents[2]


async def test_closed_loop_asks_for_every_text_once_with_so_many_clients() -> None:
    asked: list[str] = []
    under_way = most = 0

    async def ask(text: str) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        asked.append(text)
        await asyncio.sleep(0)
        under_way -= 1

    texts = [f"text {number}" for number in range(50)]
    load = await closed_loop(lambda _: ask, texts, 7)
    assert sorted(asked) == sorted(texts)
    assert (most, len(load.latencies)) == (7, 50)


async def test_arrivals_end_with_what_they_stand_beside_and_are_all_answered() -> None:
    until = asyncio.get_running_loop().create_future()
    answered: list[str] = []

    async def ask(text: str) -> None:
        answered.append(text)
        if len(answered) == 3:
            until.set_result(None)

    assert len(await arrivals(ask, ["a", "b"], 1000.0, until)) == len(answered)
    assert answered[:3] == ["a", "b", "a"]


def test_figures_are_medians_and_ratios_are_taken_within_rounds() -> None:
    own = [Load(1.0, [0.1] * 10, rows=5.0, cpu_seconds=0.2), Load(2.0, [0.2] * 10, rows=5.0, cpu_seconds=0.4)]
    other = [Load(2.0, [0.2] * 10), Load(4.0, [0.4] * 10)]
    row = digest(own)
    assert (row["requests"], row["requests_per_second"], row["rows"]) == (20, 7.5, 5.0)
    assert row["cpu_s"] == pytest.approx(0.03)
    assert row["p50_s"] == pytest.approx(0.15)
    assert against(own, other, lambda turn: turn.rate) == 2
    assert against(own, None, lambda turn: turn.rate) is None


def test_requests_of_a_turn_are_as_many_as_fit_and_one_of_each_client_at_least() -> None:
    assert [n_requests(40.0, clients, 2.0) for clients in (1, 8, 512)] == [80, 80, 512]
    assert slice_of(["a", "b", "c"], 5, 4) == ["c", "a", "b", "c"]


def test_tiny_run_writes_its_figures(tmp_path: Path) -> None:
    contestants = ("in process openvino float32", "http openvino float32")
    chosen = [argument for name in contestants for argument in ("--contestant", name)]
    sizes = ["--corpus", "short", "--texts", "24", "--rounds", "1", "--clients", "3", "--seconds", "0.01"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--app", *sizes, *chosen, "--json", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["app"]
    assert [row["name"] for row in found["clients"]] == list(contestants)
    for row in found["clients"]:
        assert (row["corpus"], row["clients"], row["requests"]) == ("short", 3, 3)
        assert 0 < row["p50_s"] <= row["p99_s"]
        assert 1 <= row["rows"] <= 3
        assert row["padded_tokens"] > 0
        assert row["times_encode"] is None  # it did not take part
    (beside,) = found["beside_a_job"]
    assert beside["name"] == contestants[0]
    assert beside["part_of_alone"] > 0


def test_clients_without_app_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--startup", "--clients", "3", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--clients goes with --app" in done.stderr
