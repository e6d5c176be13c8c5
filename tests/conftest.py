"""Fixtures that many tests share. The model is loaded once; engines are opened inside the tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncembed import EmbedOptions, load_encoder

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "examples" / "notes.csv"


@pytest.fixture(scope="session")
def encoder() -> Any:
    """The real model, all-MiniLM-L6-v2 in float32 on the CPU, run by torch."""
    return load_encoder(EmbedOptions(device="cpu", backend="torch"))


@pytest.fixture(scope="session")
def model(encoder: Any) -> Any:
    """The same as a live `SentenceTransformer`."""
    return encoder.model


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """No thread of ours outlives the test."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncembed")] == []


async def all_tasks_done() -> None:
    """Wait until no other task runs on this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        with anyio.fail_after(30):
            await asyncio.wait(others)
