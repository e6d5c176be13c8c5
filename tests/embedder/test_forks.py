"""An embedder in a process made by a fork: refused at once, as nobody there would ever answer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FORKED = """
import asyncio, os, signal, threading
from asyncembed import AsyncEmbedder, ClosedError, embed_stream
from tests.fakes import FakeEncoder

def refusal(work):
    try:
        work()
    except ClosedError as error:
        return str(error)
    return "not refused"

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
embedder = AsyncEmbedder(FakeEncoder())
asyncio.run_coroutine_threadsafe(embedder.__aenter__(), loop).result()

async def job():
    await embed_stream(["a"], embedder=embedder, save_path=None)

with embedder._handing_over:  # as a call from another thread may hold it at that moment
    child = os.fork()
if not child:
    signal.alarm(30)  # whoever waits for ever ends all the same
    said = {
        refusal(lambda: asyncio.run(embedder.embed("a"))),
        refusal(lambda: embedder.embed_threadsafe("a").result()),
        refusal(lambda: asyncio.run(job())),
        refusal(lambda: embedder.embed_nowait("a")),
        refusal(lambda: embedder.encoder),
    }
    asyncio.run(embedder.aclose())
    print(*said, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(embedder.embed_threadsafe("a").result().shape)
asyncio.run_coroutine_threadsafe(embedder.aclose(), loop).result()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_embedder_in_a_forked_child_refuses_and_the_parents_goes_on() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    refused, shape = done.stdout.splitlines()
    assert refused == "the embedder was opened before a fork, in the parent process: open one in this process"
    assert shape == "(4,)"
