"""What is learnt of batches is there for the next run; damage, death and neighbours make it no worse than nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed import EmbeddingGenerator, embed_stream
from asyncembed.encoders import FloatMatrix
from asyncembed.engine.engine import ModelRunner
from asyncembed.engine.limit_memory import FORGET_KILL_AFTER_S, RETUNE_AFTER_S, LimitMemory, _digest
from asyncembed.engine.limits import initial_limit
from asyncembed.records import Batch
from tests.core.fakes import chunk
from tests.fakes import FakeEncoder

LEARNT = {"limit": 700, "failed_at": 1000, "killed_at": None, "fastest": 600, "successes": 3, "is_old": False}
SEEN = {"learnt": LEARNT, "largest": 690, "bytes_per_token": None, "tuned_at": 5.0, "killed_on": None, "deaths": {}}
"""What a file holds."""


def gpu(on_batch: Callable[[Batch], None] | None = None) -> FakeEncoder:
    """A model on a GPU that shares the process's memory: its fastest size is searched for, and a batch may kill."""
    encoder = FakeEncoder(on_batch=on_batch)
    encoder.device = "mps"
    return encoder


def batch_of(n_tokens: int) -> Batch:
    """One row."""
    return Batch((chunk(n_tokens),))


def begin_batch(memory: LimitMemory, n_tokens: int) -> ModelRunner:
    """One that stays under way."""
    memory.encoder.slots = 2
    runner = ModelRunner(memory.encoder, memory)
    assert runner.advance(batch_of(n_tokens), memory.estimator.learnt()) is None
    return runner


def run_batch(memory: LimitMemory, n_tokens: int) -> FloatMatrix:
    runner = ModelRunner(memory.encoder, memory)
    outcome = runner.advance(batch_of(n_tokens), memory.estimator.learnt()) or runner.advance(None)
    assert outcome is not None
    if outcome.error is not None:
        raise outcome.error
    assert outcome.vectors is not None
    return outcome.vectors


def store(folder: Path, encoder: FakeEncoder, **changes: object) -> Path:
    """A file as an earlier run left it."""
    memory = LimitMemory(encoder, folder=folder)
    run_batch(memory, 10)
    memory.close()
    assert stored(memory.path).keys() == {*SEEN, *LEARNT}
    learnt = {name: changes.pop(name, value) for name, value in LEARNT.items()}
    put(memory.path, {**SEEN, **changes, "learnt": learnt})
    return memory.path


def put(path: Path, remembered: dict[str, Any]) -> None:
    data = json.loads(path.read_bytes())
    path.write_text(json.dumps({**data, "remembered": remembered, "digest": _digest(remembered)}))


def stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())["remembered"]
    return {**found, **found["learnt"]}


# --- the file ---


def test_memory_keeps_what_was_stored_and_leaves_one_file(tmp_path: Path) -> None:
    path = store(tmp_path, gpu())
    memory = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 6.0)
    assert (memory.estimator(), memory.estimator.failed_at) == (600, 1000)
    memory.close()
    assert json.loads(path.read_bytes())["remembered"] == {**SEEN, "learnt": {**LEARNT, "limit": 500}}  # none is proven
    assert list(tmp_path.iterdir()) == [path]


def test_memory_of_another_model_or_device_is_not_used(tmp_path: Path) -> None:
    store(tmp_path, FakeEncoder())
    for encoder in (FakeEncoder(dim=8), gpu()):
        assert LimitMemory(encoder, folder=tmp_path).estimator.failed_at is None


def test_memory_of_a_cpus_fastest_size_is_ignored(tmp_path: Path) -> None:
    path = store(tmp_path, FakeEncoder(), limit=1024, failed_at=None, fastest=256, tuned_at=time.time())
    memory = LimitMemory(FakeEncoder(), folder=tmp_path)
    assert memory.estimator() == 1024
    memory.close()
    assert (stored(path)["fastest"], stored(path)["tuned_at"]) == (None, None)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_memory_of_a_damaged_file_is_nothing_or_sound(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("limits")
    path = store(folder, FakeEncoder())
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    assert 1 <= LimitMemory(FakeEncoder(), folder=folder).estimator() <= 1024


def test_memory_that_cannot_be_written_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    memory = LimitMemory(FakeEncoder(), folder=blocked)
    run_batch(memory, 100)
    memory.close()
    assert LimitMemory(FakeEncoder(), folder=blocked).estimator() == 1024
    assert [record.message.split(":")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "what is learnt of batches cannot be kept for the next run"
    ]


# --- what is learnt ---


def test_memory_begins_with_the_limit_that_ran_out_of_memory(tmp_path: Path) -> None:
    first = LimitMemory(FakeEncoder(), folder=tmp_path)
    first.estimator.succeed(1024)
    first.estimator.fail(1024)
    first.close()
    second = LimitMemory(FakeEncoder(), folder=tmp_path)
    assert second.estimator() == 512
    assert second.estimator.failed_at == 1024


def test_memory_of_the_fastest_size_is_used_at_once_and_searched_for_again_after_a_month(tmp_path: Path) -> None:
    first = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 1000.0)
    for _ in range(300):
        n_tokens = first.estimator()
        first.estimator.succeed(n_tokens, max(n_tokens, 65_536**2 / n_tokens))  # 65,536 and more are as good
    first.close()
    best = first.estimator()
    assert best == 65_536
    second = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 2000.0)
    for _ in range(50):
        assert second.estimator() == best
        second.estimator.succeed(best, 1.0)
    second.close()
    late = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 1001.0 + RETUNE_AFTER_S)
    sizes = set()
    assert late.estimator() == best
    for _ in range(6):
        sizes.add(late.estimator())
        late.estimator.succeed(late.estimator(), 1.0)
    assert len(sizes) == 2  # another size has a turn


def test_memory_search_that_is_due_again_and_does_not_end_forgets_nothing(tmp_path: Path) -> None:
    path = store(tmp_path, gpu(), limit=2048, failed_at=None, fastest=2048)
    memory = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 6.0 + RETUNE_AFTER_S)
    run_batch(memory, 2048)
    memory.close()
    assert (stored(path)["fastest"], stored(path)["tuned_at"]) == (2048, 5.0)


def test_memory_failure_ends_the_search_and_the_best_size_is_kept_for_a_month(tmp_path: Path) -> None:
    first = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 1000.0)
    while first.estimator() < 65_536:
        first.estimator.succeed(first.estimator(), 1.0)
    first.estimator.fail(65_536)
    first.close()
    for later, n_sizes in ((1001.0, 1), (1001.0 + RETUNE_AFTER_S, 2)):
        memory = LimitMemory(gpu(), folder=tmp_path, clock=lambda at=later: at)
        sizes = set()
        for _ in range(6):
            sizes.add(memory.estimator())
            memory.estimator.succeed(memory.estimator(), 1.0)
        assert len(sizes) == n_sizes
        assert max(sizes) == 32_768


def test_memory_limit_of_the_user_is_neither_remembered_nor_kept(tmp_path: Path) -> None:
    path = store(tmp_path, FakeEncoder())
    before = path.read_bytes()
    memory = LimitMemory(FakeEncoder(), 300, folder=tmp_path)
    assert memory.estimator() == 300
    run_batch(memory, 50)
    memory.estimator.fail(300)
    memory.close()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_memory_limit_that_proves_wrong_is_corrected_before_the_next_batch(tmp_path: Path) -> None:
    path = store(tmp_path, gpu(), limit=4000, fastest=4000, failed_at=None)
    memory = LimitMemory(gpu(), folder=tmp_path, clock=lambda: 6.0)
    assert memory.estimator() == 4000
    memory.estimator.fail(4000)
    run_batch(memory, 100)
    assert (stored(path)["limit"], stored(path)["failed_at"]) == (2000, 4000)


def test_memory_failure_is_doubted_over_several_runs(tmp_path: Path) -> None:
    store(tmp_path, FakeEncoder(), limit=900, successes=0)
    for _ in range(9):
        memory = LimitMemory(FakeEncoder(), folder=tmp_path)
        for _ in range(60):
            memory.estimator.succeed(memory.estimator())
        memory.close()
    assert memory.estimator.failed_at is None


# --- a larger batch is noted before it runs ---


class Spy(FakeEncoder):
    """Looks at the notes while a batch runs."""

    def __init__(self, look: Callable[[], int]) -> None:
        super().__init__(max_tokens=4096)
        self.notes: list[int] = []
        self._look = look

    def start(self, batch: Batch) -> Any:
        self.notes.append(self._look())
        return super().start(batch)


def test_batch_larger_than_any_before_is_noted_while_it_runs(tmp_path: Path) -> None:
    spy = Spy(lambda: len(list(tmp_path.glob("*.trial"))))
    memory = LimitMemory(spy, folder=tmp_path)
    for n_tokens in (1000, 1000, 900, 1010, 2000, 2000, 1500):
        run_batch(memory, n_tokens)
        assert list(tmp_path.glob("*.trial")) == []
    assert spy.notes == [1, 0, 0, 0, 1, 0, 0]  # 1,010 is as good as tried
    memory.close()
    again = Spy(spy._look)
    run_batch(LimitMemory(again, folder=tmp_path), 2000)
    assert again.notes == [0]  # in another run too


def test_batch_that_fails_is_no_death(tmp_path: Path) -> None:
    def fail(_: Batch) -> None:
        raise MemoryError

    memory = LimitMemory(FakeEncoder(on_batch=fail), folder=tmp_path)
    with pytest.raises(MemoryError):
        run_batch(memory, 500)
    assert list(tmp_path.glob("*.trial")) == []


# --- deaths ---


def begin(folder: Path, n_tokens: int) -> Path:
    """The note of a batch that is under way in this process."""
    begin_batch(LimitMemory(gpu(), folder=folder), n_tokens)
    (note,) = folder.glob("*.trial")
    return note


def die(folder: Path, n_tokens: int) -> None:
    """As a process that was killed leaves its note behind: its number is another's now."""
    note = begin(folder, n_tokens)
    facts = json.loads(note.read_bytes())
    note.write_text(json.dumps({**facts, "started": facts["started"] - 1000}))


def test_note_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    note = begin(tmp_path, 100)
    assert LimitMemory(gpu(), folder=tmp_path).estimator() == 16_384
    assert note.exists()


def test_note_of_a_dead_process_is_told_once_and_to_its_model_alone(tmp_path: Path) -> None:
    die(tmp_path, 100)
    assert LimitMemory(FakeEncoder(), folder=tmp_path).estimator() == 1024
    assert LimitMemory(gpu(), folder=tmp_path).estimator() == 50
    (path,) = tmp_path.iterdir()
    assert (stored(path)["limit"], stored(path)["killed_at"]) == (50, 100)


def test_note_of_another_host_is_left_alone_and_dropped_after_a_week(tmp_path: Path) -> None:
    """Its process number says nothing here, whatever has it."""
    note = begin(tmp_path, 100)
    note.write_text(json.dumps({**json.loads(note.read_bytes()), "started": 1000.0, "host": "another"}))
    for days, stays in ((0, True), (6, True), (8, False)):
        at = time.time() - days * 24 * 3600
        os.utime(note, (at, at))
        assert LimitMemory(gpu(), folder=tmp_path).estimator() == 16_384
        assert note.exists() == stays


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"n_tokens": 0}', '{"n_tokens": 100, "pid": 1e999, "started": 1}'])
def test_note_that_is_damaged_is_dropped(damage: str, tmp_path: Path) -> None:
    note = begin(tmp_path, 100)
    note.write_text(damage)
    assert LimitMemory(gpu(), folder=tmp_path).estimator() == 16_384
    assert not note.exists()


def test_batch_as_large_as_one_that_killed_is_noted_though_another_run_had_larger_ones(tmp_path: Path) -> None:
    path = store(tmp_path, gpu(), largest=50)
    die(tmp_path, 100)
    put(path, SEEN)
    notes: list[Path] = []
    run_batch(LimitMemory(gpu(lambda _: notes.extend(tmp_path.glob("*.trial"))), folder=tmp_path), 100)
    assert len(notes) == 1
    assert not notes[0].exists()


@pytest.mark.parametrize("killed_at", [100, 1024, 5000])
def test_limit_after_a_death_begins_below_and_stays_below_for_a_week(killed_at: int, tmp_path: Path) -> None:
    now = time.time()
    store(tmp_path, gpu(), limit=6000, fastest=6000, largest=50, tuned_at=now)
    die(tmp_path, killed_at)
    memory = LimitMemory(gpu(), folder=tmp_path, clock=lambda: now)
    for _ in range(600):
        assert memory.estimator() <= killed_at // 2
        memory.estimator.succeed(memory.estimator(), 1.0)
    memory.close()
    for later, stays in ((now + 1, True), (now + 1 + FORGET_KILL_AFTER_S, False)):
        memory = LimitMemory(gpu(), folder=tmp_path, clock=lambda at=later: at)
        for _ in range(64):
            memory.estimator.succeed(memory.estimator())
        assert (memory.estimator() <= killed_at // 2) == stays


def test_run_killed_in_a_large_batch_starts_lower_next_time(cache_folder: Path) -> None:
    """Real processes and the real model; a batch above 700 padded tokens is killed as the kernel would do it."""
    codes, limits = [], []
    for _ in range(4):
        done = child("killed", "700", "12")
        codes.append(done.returncode)
        if done.returncode == 0:
            limits.append(json.loads(done.stdout))
            break
    assert codes == [-9, 0]  # the note of the first made the second small enough
    assert limits[0]["embedded"] == 12
    assert limits[0]["token_limit"] < 700
    assert not list(cache_folder.glob("asyncembed/limits/*.trial"))


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A job in a process of its own; one arena, as each would take 64 MiB of address space."""
    command = [sys.executable, "-m", "tests.children", *arguments]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=100)


# --- memory that really runs out ---


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not enforced elsewhere")
def test_real_exhaustion_finishes_every_text_and_the_next_job_knows(cache_folder: Path) -> None:
    """Torch's case; OpenVINO's is in `bin/soak --oom`.

    So many texts that one of the first two batches is too large, however few had been read for the first.
    """
    jobs = []
    for number in range(2):  # a process each: what the first leaves taken is not the second's to learn
        done = child("exhausted", "torch", "200", "100", *([str(jobs[0]["bound"])] if number else []))
        assert done.returncode == 0, done.stderr
        jobs.append(json.loads(done.stdout))
    first, second = jobs
    assert (first["embedded"], first["failed"], first["errors"]) == (100, 0, [])
    assert first["ooms"] > 0
    assert first["token_limit"] < 16_384
    assert (second["embedded"], second["failed"]) == (100, 0)
    assert second["largest"] < first["largest"]  # what failed is not tried again
    assert len(limits_in(cache_folder)) == 1


@pytest.mark.parametrize(("n_texts", "n_chars"), [(10_000, 44), (6, 400_000)])
def test_memory_is_held_however_fast_the_source_is(n_texts: int, n_chars: int) -> None:
    budget = 48 << 20
    done = child("held", str(n_texts), str(n_chars), str(budget))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["embedded"] == n_texts
    assert found["above_model"] <= budget + (16 << 20)  # the libraries that the first long text loads


# --- headroom ---


@pytest.mark.parametrize(("slots", "limit"), [(1, 500), (2, 250), (5000, 1)])
def test_limit_is_capped_on_a_cpu_at_what_half_of_the_free_memory_holds(
    slots: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, FakeEncoder(), limit=1024, failed_at=None, largest=2000, bytes_per_token=1000.0)
    monkeypatch.setattr("asyncembed.engine.limit_memory.available_bytes", lambda: 1_000_000)
    memory = LimitMemory(FakeEncoder(slots=slots), folder=tmp_path)
    assert memory.estimator() == limit
    monkeypatch.setattr("asyncembed.engine.limit_memory.available_bytes", lambda: 10**12)
    memory.encoder.slots = 1
    for _ in range(200):
        run_batch(memory, memory.estimator())
        memory.estimator.succeed(memory.estimator())
    assert memory.estimator() == initial_limit("cpu", slots)


# --- whole jobs ---


def limits_in(folder: Path) -> list[Path]:
    return sorted((folder / "asyncembed" / "limits").glob("*"))


async def test_job_leaves_what_it_learnt_and_no_note(cache_folder: Path, no_leftovers: None) -> None:
    texts = [f"text number {number} of a few words" for number in range(2000)]
    await embed_stream(texts, model=FakeEncoder(), save_path=None)
    (path,) = limits_in(cache_folder)
    assert json.loads(path.read_bytes())["remembered"]["largest"] > 0


async def test_job_that_is_left_early_leaves_no_note(cache_folder: Path, no_leftovers: None) -> None:
    async with embed_stream(
        (f"text {number}" for number in range(10**6)), model=FakeEncoder(slots=2), save_path=None
    ) as s:
        async for _ in s:
            break
    assert [path.suffix for path in limits_in(cache_folder)] == [".json"]


async def test_job_with_an_estimator_or_limit_of_the_users_own_leaves_nothing(cache_folder: Path) -> None:
    await embed_stream(["a text"], model=FakeEncoder(), save_path=None, token_limit=64)
    assert limits_in(cache_folder) == []


def test_generator_and_steps_begin_with_what_was_learnt(model: Any, cache_folder: Path) -> None:
    first = EmbeddingGenerator(model, save_path=None)
    assert first.limit_estimator() == 1024
    first.limit_estimator.fail(900)
    first([f"text {number}" for number in range(3)])
    second = EmbeddingGenerator(model, save_path=None)
    assert second.limit_estimator() == 450
    chunks: list[Any] = []
    with second:
        second.fill_texts(iter(["a text of some words"]))
        chunks = second.find_best_chunks()
        second.succeed(chunks, second.embed(chunks))
    assert [path.suffix for path in limits_in(cache_folder)] == [".json"]
