"""A real server process with the real model: what OpenAI's own client gets from it, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest

from asyncembed.server.serving import bound
from tests.core.minilm import fast_tokenizer

from .running import ServerProcess

NAME = "all-MiniLM-L6-v2"
TEXTS = ["a heron on the river", "a boat at the mooring", "Ein Reiher am Fluss. " * 90, "日本語のテキスト", "x"]
KEY = "s3cret"
HEADER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server that all tests of this module share."""
    arguments = ("--alias", "text-embedding-3-small", "--long-texts", "truncate", "--accept-token-ids")
    with ServerProcess(*arguments, ASYNCEMBED_API_KEY=KEY) as one:
        yield one.wait_ready()
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0


@pytest.fixture(scope="module")
def expected(model: Any) -> npt.NDArray[np.float32]:
    """What `encode` gives."""
    found: npt.NDArray[np.float32] = model.encode(TEXTS)
    return found


def cosines(found: Any, expected: Any) -> Any:
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_openai_client_gets_the_vectors_of_encode(url: str, expected: Any) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        plain = client.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
        packed = client.embeddings.create(model=NAME, input=TEXTS)  # this client asks for base64 by itself
        one = client.embeddings.create(model="text-embedding-3-small", input=TEXTS[0])
        ids = fast_tokenizer().tokenize(TEXTS[:1])[0].ids.tolist()
        of_ids = client.embeddings.create(model=NAME, input=[ids, ids[1:-1]])
        alone = client.embeddings.create(model=NAME, input=ids, user="somebody")
        short = client.embeddings.create(model=NAME, input=TEXTS, dimensions=64)
        models = [model.id for model in client.models.list()]
        assert client.models.retrieve(NAME).id == NAME
    assert cosines([data.embedding for data in plain.data], expected).min() >= 0.99999
    packed_vectors = [data.embedding for data in packed.data]
    np.testing.assert_allclose(packed_vectors, [data.embedding for data in plain.data], atol=1e-6)  # of another batch
    assert [data.index for data in plain.data] == list(range(len(TEXTS)))
    assert one.model == "text-embedding-3-small"
    for same in (one, of_ids, alone):
        assert cosines([data.embedding for data in same.data], expected[[0] * len(same.data)]).min() >= 0.99999
    assert plain.usage.prompt_tokens == plain.usage.total_tokens
    assert (one.usage.prompt_tokens, of_ids.usage.prompt_tokens) == (len(ids) - 2, 2 * (len(ids) - 2))
    cut = expected[:, :64] / np.linalg.norm(expected[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose([data.embedding for data in short.data], cut, atol=1e-5)
    assert {NAME, "text-embedding-3-small"} <= set(models)


async def test_64_at_a_time_through_the_async_client_are_each_answered_with_their_own(url: str, model: Any) -> None:
    texts = [f"note number {number} about {'a heron ' * (number % 9)}" for number in range(64)]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        answers = await asyncio.gather(*(client.embeddings.create(model=NAME, input=text) for text in texts))
    assert cosines([answer.data[0].embedding for answer in answers], model.encode(texts)).min() >= 0.99999


def test_openai_client_raises_its_own_errors(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as poison:
            client.embeddings.create(model=NAME, input=["fine", "🦆"])
        with pytest.raises(openai.BadRequestError, match="empty string"):
            client.embeddings.create(model=NAME, input="")
        with pytest.raises(openai.BadRequestError, match="empty list"):
            client.embeddings.create(model=NAME, input=[])
        with pytest.raises(openai.BadRequestError, match="a vector of this model has 384"):
            client.embeddings.create(model=NAME, input="a", dimensions=385)
        with pytest.raises(openai.BadRequestError, match="token id 30522 is not in the model's vocabulary"):
            client.embeddings.create(model=NAME, input=[30522])
        with pytest.raises(openai.NotFoundError) as unknown:
            client.embeddings.create(model="gpt-7", input="a")
    assert (poison.value.param, poison.value.code) == ("input[1]", "text_not_embeddable")
    assert unknown.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.embeddings.create(model=NAME, input="a")


def test_raw_shapes(url: str) -> None:
    with httpx.Client(base_url=url, headers=HEADER) as http:
        both = [
            http.post("/v1/embeddings", json={"input": "a heron", "model": NAME, "encoding_format": form}).json()
            for form in ("float", "base64")
        ]
        page, metrics = http.get("/"), http.get("/metrics")
        health = httpx.get(f"{url}/health")
        refused = httpx.get(f"{url}/metrics")
    plain, packed = (answer["data"][0]["embedding"] for answer in both)
    assert np.array_equal(np.array(plain, np.float32), np.frombuffer(base64.b64decode(packed), "<f4"))
    assert f"{url}/v1" in page.text
    assert "384 dimensions" in page.text
    assert 'asyncembed_requests_total{path="/v1/embeddings",status="200"}' in metrics.text
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    assert refused.status_code == 401


def test_large_list_is_answered_whole_and_in_order(url: str) -> None:
    texts = [f"number {number}" for number in range(400)]
    with httpx.Client(base_url=url, headers=HEADER, timeout=60) as http:
        data = http.post("/v1/embeddings", json={"input": texts}).json()["data"]
        alone = http.post("/v1/embeddings", json={"input": texts[321]}).json()["data"][0]
    assert [one["index"] for one in data] == list(range(400))
    np.testing.assert_allclose(data[321]["embedding"], alone["embedding"], atol=1e-5)


def begun_request(url: str, body: bytes) -> socket.socket:
    """A connection with a request under way: its head was read, its body is awaited."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
    return connection


def test_sigterm_answers_what_is_under_way_and_takes_no_more() -> None:
    body = b'{"input": "a heron on the river"}'
    with ServerProcess() as server:
        url = server.wait_ready()
        with begun_request(url, body) as connection:
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("SIGTERM: no new requests")
            connection.sendall(body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))  # to the end: it closes the connection
        assert server.process.wait(60) == 0
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"prompt_tokens":5' in answer
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_request_that_outlasts_the_time_to_drain_is_told_that_the_server_ends() -> None:
    with ServerProcess("--drain-s", "0.2") as server, begun_request(server.wait_ready(), b"{}") as connection:
        server.process.send_signal(signal.SIGTERM)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert server.process.wait(60) == 0
        server.wait_for("for up to 0.2 s")
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"shutting_down"' in answer


def test_second_signal_ends_it_at_once() -> None:
    with ServerProcess() as server, begun_request(server.wait_ready(), b"{}"):
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM: no new requests")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("left at once")
        assert server.process.wait(60) == 143


def test_signal_while_the_model_loads_ends_it() -> None:
    with ServerProcess() as server:
        server.wait_for("listening on")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0


def test_model_that_cannot_be_loaded_is_told_and_exit_3() -> None:
    with ServerProcess("--model", "/no/such/folder") as server:
        server.wait_for("error: there is no folder '/no/such/folder'")
        assert server.process.wait(60) == 3


def test_port_that_is_taken_is_told_and_exit_3() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServerProcess("--port", str(port)) as server:
            server.wait_for(f"error: cannot listen on 127.0.0.1 port {port}")
            assert server.process.wait(60) == 3


async def test_answers_are_not_held_back_until_the_client_acknowledges_their_head() -> None:
    found: asyncio.Queue[int] = asyncio.Queue()

    async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.put_nowait(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with bound("127.0.0.1", 0) as listener:
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(found.get(), 30) != 0
            writer.close()
            await writer.wait_closed()
