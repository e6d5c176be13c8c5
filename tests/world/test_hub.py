"""A model that is named on a hub, where there is no network."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import ModelError, embed_stream
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


async def test_model_downloaded_before_is_used_without_a_network(hub: Refusing, tmp_path: Path) -> None:
    model: Any = make_model("bert", tmp_path / "bare")
    kept = tmp_path / "hub" / "models--strangers--herons"
    model.save(str(kept / "snapshots" / ("0" * 40)))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    hub.n_connections = 0  # saving asks for something too
    async with embed_stream(["a heron"], model="strangers/herons", backend="torch", save_path=None) as stream:
        vectors = await stream
    np.testing.assert_allclose(vectors["a heron"], model.encode("a heron"), atol=1e-5)
    assert (stream.summary.model, hub.n_connections) == ("strangers/herons", 1)
