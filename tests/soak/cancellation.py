"""`--cancel`: every form of a job, cancelled at every step of any of its tasks."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tests.cancelling import FORMS, VICTIMS, cancel_at
from tests.soak.figures import Figures


def storm(work: Path) -> Iterator[Figures]:
    """Cancel at step 1, 2, 3, … until the job ends before the step comes.

    Args:
        work: A folder for the jobs.
    """
    logging.getLogger("asyncembed").setLevel(logging.ERROR)
    n_steps = n_left = 0
    broken: list[str] = []
    for form in FORMS:
        for victim in VICTIMS[form]:
            for step in count(1):
                came_that_far, wrong = cancel_at(form, victim, step, work / "data")
                shutil.rmtree(work, ignore_errors=True)
                if wrong:
                    n_left += 1
                    broken.append(f"{form}, {victim} cancelled at step {step}: {'; '.join(wrong)}")
                if not came_that_far:
                    break
                n_steps += 1
    figures = {"forms": len(FORMS), "cancellations": n_steps, "with something left": n_left}
    yield Figures("a job cancelled at each of its steps", figures, tuple(broken[:20]))
