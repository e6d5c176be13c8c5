"""The app over a model in the test's hand: every status and error, and what happens to those who give up."""

from __future__ import annotations

import socket
import time
import tracemalloc
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from blockbuster import BlockingError, blockbuster_ctx

from asyncembed import AsyncEmbedder
from asyncembed.records import Batch
from asyncembed.server.app import make_app
from asyncembed.server.service import Service
from asyncembed.server.settings import ServerSettings
from tests.embedder.doubles import at_rest, held_model, until, vector
from tests.fakes import FakeEncoder

from .running import client, listening, opened

pytestmark = pytest.mark.usefixtures("no_leftovers")

PATH = "/v1/embeddings"
TOO_LONG = "word " * 99
"""Poison for a model that takes 64 tokens, if long texts are errors."""


def refused(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    return error


async def test_text_and_list_are_answered_in_openais_shape() -> None:
    async with opened(AsyncEmbedder(FakeEncoder())) as service, client(service) as http:
        one = (await http.post(PATH, json={"input": "a heron", "model": "all-MiniLM-L6-v2"})).json()
        many = (await http.post(PATH, json={"input": ["on the river", "a heron"]})).json()
    assert one == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector("a heron")}],
        "model": "all-MiniLM-L6-v2",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    assert [data["embedding"] for data in many["data"]] == [vector("on the river"), vector("a heron")]
    assert many["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


async def test_models_health_page_and_metrics_say_what_there_is() -> None:
    settings = {"model": "/models/heron-base", "aliases": ("text-embedding-3-small",)}
    async with opened(AsyncEmbedder(FakeEncoder()), **settings) as service, client(service) as http:
        await http.post(PATH, json={"input": "a heron", "model": "text-embedding-3-small"})
        listed = (await http.get("/v1/models")).json()
        one = (await http.get("/v1/models/heron-base")).json()
        unknown = await http.get("/v1/models/owl/base")
        health = await http.get("/health")
        page = await http.get("/")
        metrics = (await http.get("/metrics")).text
    assert [model["id"] for model in listed["data"]] == ["heron-base", "/models/heron-base", "text-embedding-3-small"]
    assert (one["id"], one["object"], one["owned_by"]) == ("heron-base", "model", "asyncembed")
    named = refused(unknown, 404, "model_not_found")["message"]
    assert named.endswith("'heron-base', also called '/models/heron-base', 'text-embedding-3-small'")
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    assert page.headers["content-type"].startswith("text/html")
    assert "http://server/v1" in page.text
    assert "heron-base" in page.text
    for line in (
        'asyncembed_requests_total{path="/v1/embeddings",status="200"} 1.0',
        'asyncembed_requests_total{path="/v1/models",status="404"} 1.0',
        'asyncembed_request_seconds_count{path="/health"} 1.0',
        "asyncembed_tokens_total 2.0",
        "asyncembed_texts_total 1.0",
        "asyncembed_batches_total 1.0",
        "asyncembed_ooms_total 0.0",
        "asyncembed_queue_requests 0.0",
        "asyncembed_ready 1.0",
    ):
        assert line in metrics.splitlines()


async def test_what_is_not_there_is_refused_in_the_same_shape() -> None:
    async with opened(AsyncEmbedder(FakeEncoder())) as service, client(service) as http:
        refused(await http.get("/v1/nothing"), 404, "not_found")
        wrong_method = await http.get(PATH)
        refused(wrong_method, 405, "method_not_allowed")
        assert wrong_method.headers["allow"] == "POST"
        refused(await http.post(PATH, content=b"{"), 400, "invalid_json")
        refused(await http.post(PATH, json={"input": "a", "model": "gpt-7"}), 404, "model_not_found")
        too_many = refused(await http.post(PATH, json={"input": "a", "dimensions": 5}), 400)
    assert too_many["param"] == "dimensions"
    assert "has 4" in too_many["message"]


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}])
async def test_without_the_key_only_health_answers(header: dict[str, str]) -> None:
    async with opened(AsyncEmbedder(FakeEncoder()), api_key="s3cret") as service, client(service) as http:
        for path in ("/", "/metrics", "/v1/models", "/v1/nothing"):
            refused(await http.get(path, headers=header), 401, "invalid_api_key")
        refused(await http.post(PATH, json={"input": "a"}, headers=header), 401, "invalid_api_key")
        assert (await http.get("/health")).status_code == 200
        let_in = await http.post(PATH, json={"input": "a"}, headers={"Authorization": "bearer s3cret"})
        assert let_in.status_code == 200


async def test_body_larger_than_the_limit_is_refused_declared_or_not() -> None:
    async def pieces() -> Any:
        for _ in range(3):
            yield b" " * 40

    async with opened(AsyncEmbedder(FakeEncoder()), max_body_bytes=100) as service, client(service) as http:
        refused(await http.post(PATH, content=b" " * 101), 413, "request_too_large")
        refused(await http.post(PATH, content=pieces()), 413, "request_too_large")
        assert (await http.post(PATH, json={"input": "a"})).status_code == 200
        assert service.bodies.n_bytes == 0


async def test_poison_is_named_and_its_neighbours_are_answered() -> None:
    gate, encoder = held_model()
    async with opened(AsyncEmbedder(encoder, long_texts="error")) as service, client(service) as http:
        answers: dict[str, httpx.Response] = {}

        async def ask(name: str, given: Any) -> None:
            answers[name] = await http.post(PATH, json={"input": given})

        async with anyio.create_task_group() as group:
            group.start_soon(ask, "first", "the model is busy")
            await gate.begun()
            group.start_soon(ask, "poison", ["fine", TOO_LONG])
            group.start_soon(ask, "alone", TOO_LONG)
            group.start_soon(ask, "neighbour", "on the river")
            await until(lambda: {"poison", "alone"} <= set(answers))
            gate.let_go(3)
    error = refused(answers["poison"], 400, "text_not_embeddable")
    assert error["param"] == "input[1]"
    assert "the text has 99 tokens; a chunk takes 62" in error["message"]
    assert refused(answers["alone"], 400)["param"] == "input"
    assert answers["neighbour"].json()["data"][0]["embedding"] == vector("on the river")


async def test_no_room_now_is_429_and_never_is_413() -> None:
    gate, encoder = held_model()
    embedder = AsyncEmbedder(encoder, max_pending_bytes=8_000)
    async with opened(embedder) as service, client(service) as http:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: http.post(PATH, json={"input": ["a heron", "a boat"]}))
            await gate.begun()
            full = await http.post(PATH, json={"input": "on the river"})
            now = refused(full, 429, "overloaded")
            assert now["message"] == "too much is under way; try again in 1 second"
            assert full.headers["retry-after"] == "1"
            gate.let_go(3)
        never = refused(await http.post(PATH, json={"input": ["a", "b", "c", "d"]}), 413, "too_many_texts")
        assert never["message"] == "4 texts of this size are more than this server holds; send fewer in a request"
        gate.let_go()
        assert (await http.post(PATH, json={"input": "on the river"})).status_code == 200


async def test_before_the_model_is_loaded_and_after_it_ended_503() -> None:
    service = Service(ServerSettings(), AsyncEmbedder(FakeEncoder()))
    async with client(service) as http:
        early = await http.post(PATH, json={"input": "a"})
        refused(early, 503, "model_loading")
        assert int(early.headers["retry-after"]) >= 1
        assert (await http.get("/health")).json() == {"status": "loading"}
        assert (await http.get("/")).status_code == 200
        service.close()
        await service.run()
        refused(await http.post(PATH, json={"input": "a"}), 503, "shutting_down")
        assert (await http.get("/health")).status_code == 503


async def test_dead_device_is_told_and_ends_the_service() -> None:
    def die(_: Batch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with opened(AsyncEmbedder(FakeEncoder(on_batch=die))) as service, client(service) as http:
        refused(await http.post(PATH, json={"input": "a heron"}), 500, "model_error")
        assert service.condition == "broken"
        assert "illegal memory access" in str(service.error)
        refused(await http.post(PATH, json={"input": "a heron"}), 503, "model_error")
        assert (await http.get("/health")).status_code == 503


class Buggy(AsyncEmbedder):
    """Fails as nobody foresaw."""

    def embed_counted_nowait(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division by zero")


async def test_bug_is_500_without_its_details() -> None:
    async with opened(Buggy(FakeEncoder())) as service, client(service) as http:
        error = refused(await http.post(PATH, json={"input": "a"}), 500)
        assert error["type"] == "server_error"
        assert "division" not in error["message"]
        assert (await http.get("/health")).status_code == 200


async def test_client_that_goes_away_costs_the_model_nothing() -> None:
    gate, encoder = held_model()
    embedder = AsyncEmbedder(encoder)
    async with opened(embedder) as service, listening(service) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http, anyio.create_task_group() as group:
            group.start_soon(lambda: http.post(PATH, json={"input": "the model is busy"}))
            await gate.begun()
            body = b'{"input": ["never seen by the model", "nor this"]}'
            stream = await anyio.connect_tcp("127.0.0.1", port)
            await stream.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body)))
            await stream.send(body)
            await until(lambda: embedder.statistics().pending_requests == 2)
            await stream.aclose()
            await until(lambda: embedder.statistics().pending_requests == 1)
            gate.let_go(2)
        assert gate.batches == [["the model is busy"]]
        assert at_rest(embedder)
        line = 'asyncembed_requests_total{path="/v1/embeddings",status="499"} 1.0'
        await until(lambda: line in service.metrics.exposition().decode())


async def test_answer_that_a_client_does_not_read_is_counted_as_such() -> None:
    """16 MB, of which the kernel takes a part."""
    async with opened(AsyncEmbedder(FakeEncoder(dim=8192))) as service, listening(service) as port:
        body = b'{"input": [%b], "encoding_format": "base64"}' % b",".join(b'"text %d"' % n for n in range(384))
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await anyio.to_thread.run_sync(raw.connect, ("127.0.0.1", port))
            head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body))
            await anyio.to_thread.run_sync(raw.sendall, head + body)
            answer = await anyio.to_thread.run_sync(raw.recv, 12)
            assert answer == b"HTTP/1.1 200"
        line = 'asyncembed_requests_total{path="/v1/embeddings",status="499"} 1.0'
        await until(lambda: line in service.metrics.exposition().decode())


async def test_large_answer_arrives_whole() -> None:
    async with opened(AsyncEmbedder(FakeEncoder(dim=8192))) as service, listening(service) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = (await http.post(PATH, json={"input": [f"text {number}" for number in range(50)]})).json()
            assert [len(one["embedding"]) for one in answer["data"]] == [8192] * 50
        assert 'status="200"} 1.0' in service.metrics.exposition().decode()


async def test_client_that_goes_away_while_it_sends_leaves_nothing() -> None:
    async with opened(AsyncEmbedder(FakeEncoder())) as service, listening(service) as port:
        stream = await anyio.connect_tcp("127.0.0.1", port)
        await stream.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{" % PATH.encode())
        await until(lambda: service.bodies.n_bytes == 1)
        await stream.aclose()
        await until(lambda: service.bodies.n_bytes == 0)


async def test_body_is_freed_before_the_model_is_waited_for() -> None:
    n_blank = 8 * 2**20

    async def padded() -> Any:
        blanks = b" " * 2**16
        yield b'{"input": "a heron"'
        for _ in range(n_blank // len(blanks)):
            yield blanks
        yield b"}"

    gate, encoder = held_model()
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http, anyio.create_task_group() as group:
        tracemalloc.start()
        try:
            group.start_soon(lambda: http.post(PATH, content=padded()))
            await gate.begun()
            n_held, n_peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gate.let_go()
    assert n_peak > n_blank
    assert n_held < n_blank / 2


async def test_bodies_being_read_are_bounded_together() -> None:
    async with (
        opened(AsyncEmbedder(FakeEncoder(), max_pending_bytes=50), max_body_bytes=50) as service,
        listening(service) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        stream = await anyio.connect_tcp("127.0.0.1", port)
        await stream.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n" % PATH.encode() + b" " * 45)
        await until(lambda: service.bodies.n_bytes == 45)
        assert (await http.post(PATH, json={"input": "a"})).status_code == 200  # a small one is read all the same
        service.bodies.small_bytes = 0
        refused(await http.post(PATH, json={"input": "a"}), 429, "overloaded")
        await stream.aclose()
        await until(lambda: service.bodies.n_bytes == 0)
        assert (await http.post(PATH, json={"input": "a"})).status_code == 200


async def test_body_that_does_not_arrive_is_given_up() -> None:
    async with opened(AsyncEmbedder(FakeEncoder())) as service, listening(service) as port:
        service.bodies.read_s = 0.0  # over before the next piece can come
        stream = await anyio.connect_tcp("127.0.0.1", port)
        await stream.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n" % PATH.encode() + b" " * 45)
        with anyio.fail_after(60):
            answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 408")
        await stream.aclose()
        await until(lambda: service.bodies.n_bytes == 0)


async def test_large_answer_is_encoded_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from asyncembed.server import app

    names: list[str] = []
    encode, parse = app.encode_answer, app.parse_request

    def encoding(*arguments: Any) -> bytes:
        names.append(threading.current_thread().name)
        return encode(*arguments)

    def parsing(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return parse(*arguments)

    monkeypatch.setattr(app, "encode_answer", encoding)
    monkeypatch.setattr(app, "parse_request", parsing)
    async with opened(AsyncEmbedder(FakeEncoder(dim=384, max_tokens=9000))) as service, client(service) as http:
        texts = [f"text {number} " + "x" * 600 for number in range(120)]
        answer = await http.post(PATH, json={"input": texts, "encoding_format": "base64"})
        assert len(answer.json()["data"]) == 120
        await http.post(PATH, json={"input": "short"})
    here = threading.current_thread().name
    assert [name.startswith("asyncembed-json") for name in names] == [True, True, False, False]
    assert names[2:] == [here, here]


def block() -> None:
    time.sleep(0)


async def test_nothing_blocks_the_loop_while_it_answers(encoder: Any) -> None:
    """Files, sockets, sleeps and locks on the loop are errors here, which would make the answers 500."""
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        await http.get("/")  # what is imported at first use is read from files
        with blockbuster_ctx():
            for texts in (["a heron"], [f"text {number} " + "x" * 700 for number in range(110)]):
                answer = await http.post(PATH, json={"input": texts, "dimensions": 100})
                assert answer.status_code == 200, answer.text
            refused(await http.post(PATH, json={"input": ["a heron", "🦆"]}), 400)
            assert (await http.get("/metrics")).status_code == 200
            with pytest.raises(BlockingError):
                block()  # the control: this is seen


async def test_app_over_a_real_model_gives_its_vectors(encoder: Any, model: Any) -> None:
    texts = ["a heron on the river", "a boat"]
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        answer = (await http.post(PATH, json={"input": texts})).json()
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], model.encode(texts), atol=1e-5)


async def test_other_kinds_of_scope_are_left_to_the_framework() -> None:
    service = Service(ServerSettings(), AsyncEmbedder(FakeEncoder()))
    sent: list[Any] = []
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await make_app(service)({"type": "lifespan", "state": {}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    service.close()
    await service.run()
