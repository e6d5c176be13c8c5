"""What is learnt of batches is there for the next run; damage, death and neighbours make it no worse than nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed import EmbeddingGenerator, Encoder, TokenLimitEstimator, embed_stream
from asyncembed.limits import LearntLimit
from asyncembed.memory import tokens_that_fit
from asyncembed.records import Batch
from asyncembed.remembering import LimitFile, LimitKeeper, Remembered
from asyncembed.remembering.keeper import FORGET_KILL_AFTER_S, RETUNE_AFTER_S, step_above
from tests.core.fakes import chunk
from tests.fakes import FakeEncoder

FACTS = {"model": "a", "memory": 1 << 30}
SEEN = Remembered(
    learnt=LearntLimit(limit=700, failed_at=1000, fastest=600, successes=3),
    largest=690,
    bytes_per_token=1234.5,
    tuned_at=5.0,
)


@pytest.fixture
def file(tmp_path: Path) -> LimitFile:
    return LimitFile(FACTS, tmp_path)


def batch_of(n_tokens: int) -> Batch:
    """One row."""
    return Batch((chunk(n_tokens),))


def gpu() -> FakeEncoder:
    """A model on a GPU that shares the process's memory: its fastest size is searched for, and a batch may kill."""
    encoder = FakeEncoder()
    encoder.device = "mps"
    return encoder


# --- the file ---


def test_load_gives_what_was_stored(file: LimitFile, tmp_path: Path) -> None:
    assert file.load() is None
    file.store(SEEN)
    assert LimitFile(dict(reversed(FACTS.items())), tmp_path).load() == SEEN
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_load_of_another_machine_or_model_gives_nothing(file: LimitFile, tmp_path: Path) -> None:
    file.store(SEEN)
    assert LimitFile({**FACTS, "memory": 2 << 30}, tmp_path).load() is None
    assert LimitFile({**FACTS, "model": "b"}, tmp_path).load() is None


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_load_of_a_damaged_file_is_nothing_or_sound(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = LimitFile(FACTS, tmp_path_factory.mktemp("limits"))
    file.store(SEEN)
    whole = bytearray(file.path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    found = file.load()
    if found is not None:
        assert TokenLimitEstimator(1024, max_limit=8192, learnt=found.learnt)() >= 1
        assert found.largest >= 0


@pytest.mark.parametrize("value", [0, -1, True, "7", 1.5, [], {}])
def test_load_of_a_number_that_cannot_be_is_nothing(value: object, file: LimitFile) -> None:
    file.store(SEEN)
    data = json.loads(file.path.read_bytes())
    data["remembered"]["limit"] = value
    file.path.write_text(json.dumps(data))
    assert file.load() is None


def test_store_where_it_cannot_be_written_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    blocked = LimitFile(FACTS, tmp_path / "file")
    blocked.store(SEEN)
    blocked.begin_trial(100)
    blocked.end_trial()
    assert blocked.load() is None
    assert blocked.take_deaths() == []
    assert [record.message.split(":")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "what is learnt of batches cannot be kept for the next run"
    ]


def test_take_deaths_a_living_process_is_left_alone(file: LimitFile, tmp_path: Path) -> None:
    file.begin_trial(100)
    assert LimitFile(FACTS, tmp_path).take_deaths() == []
    file.end_trial()
    assert list(tmp_path.iterdir()) == []


def test_take_deaths_of_a_dead_process_or_a_reused_number_is_told_once(file: LimitFile, tmp_path: Path) -> None:
    file.begin_trial(100)
    (note,) = tmp_path.iterdir()
    facts = json.loads(note.read_bytes())
    note.write_text(json.dumps({**facts, "started": facts["started"] - 1000}))  # the number was another's once
    assert LimitFile({**FACTS, "model": "b"}, tmp_path).take_deaths() == []
    assert LimitFile(FACTS, tmp_path).take_deaths() == [(100, None)]
    assert LimitFile(FACTS, tmp_path).take_deaths() == []


ELSEWHERE = [{"host": "another"}, {"pid_namespace": "pid:[1]"}, {"host": "another", "boot": "another"}]


def edit_note(folder: Path, **changes: object) -> Path:
    (note,) = folder.glob("*.trial")
    note.write_text(json.dumps({**json.loads(note.read_bytes()), **changes}))
    return note


@pytest.mark.parametrize("place", ELSEWHERE)
def test_take_deaths_note_of_another_host_or_container_is_left_alone_and_dropped_after_a_week(
    file: LimitFile, tmp_path: Path, place: dict[str, str]
) -> None:
    """Its process number says nothing here, whatever has it."""
    file.begin_trial(100)
    note = edit_note(tmp_path, started=1000.0, **place)
    assert LimitFile(FACTS, tmp_path).take_deaths() == []
    for days, stays in ((6, True), (8, False)):
        at = time.time() - days * 24 * 3600
        os.utime(note, (at, at))
        assert LimitFile(FACTS, tmp_path).take_deaths() == []
        assert note.exists() == stays


def test_take_deaths_note_of_an_earlier_boot_is_a_death(file: LimitFile, tmp_path: Path) -> None:
    file.begin_trial(100)
    edit_note(tmp_path, boot="another", pid_namespace="pid:[1]", started=psutil.boot_time() - 1000)
    assert LimitFile(FACTS, tmp_path).take_deaths() == [(100, None)]
    assert list(tmp_path.iterdir()) == []


def test_take_deaths_note_of_a_namesake_of_this_host_is_left_alone(file: LimitFile, tmp_path: Path) -> None:
    file.begin_trial(100)
    note = edit_note(tmp_path, boot="another", started=psutil.boot_time() + 1000)
    assert LimitFile(FACTS, tmp_path).take_deaths() == []
    assert note.exists()


# --- the keeper ---


def test_keeper_begins_with_what_an_earlier_run_learnt(file: LimitFile) -> None:
    encoder = FakeEncoder()
    first = LimitKeeper(encoder, file=file)
    first.estimator.succeed(1024)
    first.estimator.fail(1024)
    first.close()
    second = LimitKeeper(encoder, file=file)
    assert second.estimator() == 512
    assert second.estimator.failed_at == 1024


def test_keeper_settled_size_is_used_at_once_and_never_searched_again(file: LimitFile) -> None:
    first = LimitKeeper(gpu(), file=file, clock=lambda: 1000.0)
    for _ in range(300):
        n_tokens = first.estimator()
        first.estimator.succeed(n_tokens, max(n_tokens, 65_536**2 / n_tokens))  # 65,536 and more are as good
    first.close()
    best = first.estimator()
    assert best == 65_536
    second = LimitKeeper(gpu(), file=file, clock=lambda: 2000.0)
    for _ in range(50):
        assert second.estimator() == best
        second.estimator.succeed(best, 1.0)
    second.close()
    late = LimitKeeper(gpu(), file=file, clock=lambda: 1001.0 + RETUNE_AFTER_S)
    sizes = set()
    assert late.estimator() == best
    for _ in range(6):
        sizes.add(late.estimator())
        late.estimator.succeed(late.estimator(), 1.0)
    assert len(sizes) == 2  # after a month another size has a turn


def test_keeper_search_that_is_due_again_and_does_not_end_forgets_nothing(file: LimitFile) -> None:
    file.store(replace(SEEN, learnt=LearntLimit(limit=2048, fastest=2048), tuned_at=5.0))
    keeper = LimitKeeper(gpu(), file=file, clock=lambda: 6.0 + RETUNE_AFTER_S)
    keeper.before(2048)
    keeper.close()
    found = file.load()
    assert found is not None
    assert found.learnt.fastest == 2048
    assert found.tuned_at == 5.0


def test_keeper_limit_of_the_user_is_neither_remembered_nor_kept(file: LimitFile, tmp_path: Path) -> None:
    file.store(SEEN)
    before = file.path.read_bytes()
    keeper = LimitKeeper(FakeEncoder(), 300, file=file)
    assert keeper.estimator() == 300
    keeper.encoder.finish(keeper.encoder.start(batch_of(50)))
    keeper.estimator.fail(300)
    keeper.close()
    assert file.path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_keeper_remembered_limit_that_proves_wrong_is_corrected(file: LimitFile) -> None:
    file.store(replace(SEEN, learnt=LearntLimit(limit=4000, fastest=4000)))
    keeper = LimitKeeper(gpu(), file=file, clock=lambda: 6.0)
    assert keeper.estimator() == 4000
    keeper.estimator.fail(4000)
    keeper.before(100)  # the next batch: what failed is known from here on, however the run ends
    found = file.load()
    assert found is not None
    assert (found.learnt.limit, found.learnt.failed_at) == (2000, 4000)


def test_keeper_known_failure_is_doubted_over_several_runs(file: LimitFile) -> None:
    file.store(Remembered(learnt=LearntLimit(limit=900, failed_at=1000)))
    for _ in range(9):
        keeper = LimitKeeper(FakeEncoder(), file=file)
        for _ in range(60):
            keeper.estimator.succeed(keeper.estimator())
        keeper.close()
    assert keeper.estimator.failed_at is None


# --- a larger batch is written down before it runs ---


class Spy(FakeEncoder):
    """Looks at the notes while a batch runs."""

    def __init__(self, look: Callable[[], int]) -> None:
        super().__init__(max_tokens=4096)
        self.notes: list[int] = []
        self._look = look

    def start(self, batch: Batch) -> Any:
        self.notes.append(self._look())
        return super().start(batch)


def test_watched_batch_larger_than_any_before_is_noted_while_it_runs(file: LimitFile, tmp_path: Path) -> None:
    spy = Spy(lambda: len(list(tmp_path.glob("*.trial"))))
    keeper = LimitKeeper(spy, file=file)
    assert isinstance(keeper.encoder, Encoder)
    for n_tokens in (1000, 1000, 900, 1010, 2000, 2000, 1500):
        keeper.encoder.finish(keeper.encoder.start(batch_of(n_tokens)))
        assert list(tmp_path.glob("*.trial")) == []
    assert spy.notes == [1, 0, 0, 0, 1, 0, 0]  # 1,010 is no larger than 1,000 by a step
    keeper.close()
    again = Spy(spy._look)
    LimitKeeper(again, file=file).encoder.start(batch_of(2000))
    assert again.notes == [0]  # in another run too


def test_watched_encoder_has_what_its_encoder_has_besides(file: LimitFile) -> None:
    encoder = FakeEncoder()
    encoder.prompts = {"query": "query: "}  # type: ignore[attr-defined]  # as some encoders have
    watched = LimitKeeper(encoder, file=file).encoder
    assert watched.prompts == {"query": "query: "}  # type: ignore[attr-defined]
    assert not hasattr(watched, "no_such_name")


@given(sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=300))
def test_step_above_is_a_step_that_holds_the_size_and_little_more(sizes: list[int]) -> None:
    for size in sizes:
        step = step_above(size)
        assert size <= step <= size * 1.05 + 1
        assert step_above(step) == step


def test_watched_batch_that_fails_is_no_death(file: LimitFile, tmp_path: Path) -> None:
    def fail(_: Batch) -> None:
        raise MemoryError

    keeper = LimitKeeper(FakeEncoder(on_batch=fail), file=file)
    with pytest.raises(MemoryError):
        keeper.encoder.start(batch_of(500))
    assert list(tmp_path.glob("*.trial")) == []


@pytest.mark.parametrize("killed_at", [100, 1024, 5000])
def test_keeper_after_a_death_begins_below_and_stays_below(killed_at: int, file: LimitFile, tmp_path: Path) -> None:
    now = 1000.0
    file.store(replace(SEEN, learnt=LearntLimit(limit=6000, fastest=6000), tuned_at=now))
    die_with_a_note(file, tmp_path, killed_at)
    keeper = LimitKeeper(gpu(), file=file, clock=lambda: now)
    for _ in range(600):
        assert keeper.estimator() <= killed_at // 2
        keeper.estimator.succeed(keeper.estimator(), 1.0)
    keeper.close()
    for later, stays in ((now + 1, True), (now + 1 + FORGET_KILL_AFTER_S, False)):
        keeper = LimitKeeper(gpu(), file=file, clock=lambda at=later: at)
        for _ in range(64):
            keeper.estimator.succeed(keeper.estimator())
        assert (keeper.estimator() <= killed_at // 2) == stays


def die_with_a_note(file: LimitFile, folder: Path, n_tokens: int) -> None:
    """As a process that was killed leaves its note behind."""
    file.begin_trial(n_tokens)
    (note,) = folder.glob("*.trial")
    facts = json.loads(note.read_bytes())
    note.write_text(json.dumps({**facts, "started": facts["started"] - 1000}))


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
    command = [sys.executable, "-m", "tests.remembering.children", *arguments]
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


@given(n_free=st.integers(0, 1 << 40), per_token=st.floats(1, 1e6), slots=st.integers(1, 64))
def test_tokens_that_fit_leave_half_of_the_memory(n_free: int, per_token: float, slots: int) -> None:
    fitting = tokens_that_fit(n_free, per_token, slots)
    assert fitting >= 1
    assert fitting == 1 or fitting * per_token * slots <= n_free / 2 * (1 + 1e-9)
    assert tokens_that_fit(2 * n_free, per_token, slots) >= fitting


def test_keeper_little_free_memory_caps_the_limit_and_more_lifts_it(
    file: LimitFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.store(Remembered(learnt=LearntLimit(limit=4096, fastest=4096), bytes_per_token=1000.0, tuned_at=5.0))
    monkeypatch.setattr("asyncembed.remembering.keeper.available_bytes", lambda: 1_000_000)
    keeper = LimitKeeper(gpu(), file=file, clock=lambda: 6.0)
    assert keeper.estimator() == 500
    monkeypatch.setattr("asyncembed.remembering.keeper.available_bytes", lambda: 100_000_000)
    for _ in range(64):
        keeper.before(keeper.estimator())
        keeper.estimator.succeed(keeper.estimator())
    assert keeper.estimator() == 4096


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
