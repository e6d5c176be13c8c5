"""Cancelled at any step of any of its tasks, a job leaves nothing behind and can be gone on with."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from asyncembed import ClosedError, embed_stream
from tests.cancelling import FORMS, TEXTS, VICTIMS, Leftovers, cancel_at, check_folder, count_steps
from tests.conftest import all_tasks_done
from tests.fakes import FakeEncoder

N_SAMPLES = 4
"""Steps tried of each form; `bin/soak --cancel` tries all."""


@pytest.mark.parametrize("form", FORMS)
def test_cancelled_at_any_step_nothing_is_left_and_the_next_run_completes(form: str, tmp_path: Path) -> None:
    n_steps = count_steps(form, tmp_path / "counted")
    assert n_steps > 20
    sampled = random.Random(form)
    for victim in VICTIMS[form]:
        for step in sampled.sample(range(1, n_steps), N_SAMPLES):
            _, wrong = cancel_at(form, victim, step, tmp_path / f"{victim}-{step}")
            assert wrong == [], f"{victim} cancelled at step {step}"


async def test_closing_that_is_cancelled_leaves_the_job_to_close_by_itself() -> None:
    stream = embed_stream(TEXTS * 50, model=FakeEncoder(), save_path=None)
    async for _ in stream:
        closing = asyncio.get_running_loop().create_task(stream.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        break
    await all_tasks_done()
    assert list(stream._job.results.take()) == []
    with pytest.raises(ClosedError):
        await stream._job.results.wait()


async def test_what_is_left_in_a_folder_is_seen(tmp_path: Path) -> None:
    """The test above can fail."""
    await embed_stream(TEXTS, model=FakeEncoder(), save_path=tmp_path)
    (tmp_path / "embeddings_data" / "half.tmp").touch()
    wrong = Leftovers([])
    await asyncio.to_thread(check_folder, tmp_path, wrong)
    assert wrong.found == ["temporary files: ['half.tmp']"]
