"""A model that is named on a hub, where there is no network."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from asyncembed import EmbedOptions, ModelError, embed_stream, load_encoder
from asyncembed.encoders import graph_cache
from tests.world.architectures import make_model


class Refusing:
    """A place on the network that closes each connection at once, and counts them."""

    def __init__(self) -> None:
        self.n_connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.n_connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(30)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Refusing]:
    """A hub that cannot be asked, and nothing downloaded from it."""
    from huggingface_hub import constants

    place = Refusing()
    monkeypatch.setattr(constants, "ENDPOINT", place.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
    yield place
    place.close()


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v3", "strangers/herons", "a name with blanks"])
async def test_model_name_without_a_network_is_asked_for_once(name: str, hub: Refusing) -> None:
    with pytest.raises(
        ModelError, match=f"there is no folder '{name}', no model of that name was downloaded"
    ) as refused:
        await embed_stream(["a"], model=name, save_path=None)
    assert "\n" not in str(refused.value)
    assert hub.n_connections == 1


def download(root: Path) -> tuple[Any, Path]:
    """A small model, and the folder it lies in when it was downloaded as strangers/herons."""
    model: Any = make_model("bert", root / "bare")
    kept = root / "hub" / "models--strangers--herons"
    snapshot = kept / "snapshots" / ("0" * 40)
    model.save(str(snapshot))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(snapshot.name)
    return model, snapshot


class Hub(BaseHTTPRequestHandler):
    """A hub that has one model: it tells of each file which version is the newest, and sends none."""

    files: ClassVar[Path]

    def do_HEAD(self) -> None:
        path = self.files / self.path.partition("/resolve/main/")[2]
        is_file = path != self.files and path.is_file()
        self.send_response(200 if is_file or self.path == "/" else 404)
        if is_file:
            self.send_header("X-Repo-Commit", self.files.name)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(path.stat().st_size))
        elif self.path != "/":
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", self.files.name)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A hub that answers, and a model downloaded from it: its folder."""
    from huggingface_hub import constants

    _, Hub.files = download(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Hub.files
        server.shutdown()
        thread.join(30)


def test_model_named_on_a_hub_is_converted_once(
    reachable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "asyncembed")
    options = EmbedOptions(model="strangers/herons", device="cpu", backend="openvino")
    first = load_encoder(options)
    entry = graph_cache.cache_root() / graph_cache.graph_key(reachable)
    assert caplog.messages == [f"strangers/herons is run by OpenVINO; its graph is in {entry}"]
    caplog.clear()
    assert load_encoder(options).fingerprint() == first.fingerprint()
    assert caplog.messages == []


async def test_model_downloaded_before_is_used_without_a_network(hub: Refusing, tmp_path: Path) -> None:
    model, _ = download(tmp_path)
    hub.n_connections = 0  # saving asks for something too
    async with embed_stream(["a heron"], model="strangers/herons", backend="torch", save_path=None) as stream:
        vectors = await stream
    np.testing.assert_allclose(vectors["a heron"], model.encode("a heron"), atol=1e-5)
    assert (stream.summary.model, hub.n_connections) == ("strangers/herons", 1)
