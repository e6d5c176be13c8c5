"""What other people's clients send to the server: answered with the right vectors, or refused in one clear line."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from asyncembed import AsyncEmbedder
from tests.fakes import FakeEncoder
from tests.server.running import ServerProcess, client, opened
from tests.world.test_tasks import TEXTS, adapted, router

PATH = "/v1/embeddings"


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def vectors_of(answer: httpx.Response) -> Any:
    """The vectors of an answer, shape `(n, dim)`."""
    assert answer.status_code == 200, answer.text
    return np.array([one["embedding"] for one in answer.json()["data"]])


@pytest.mark.parametrize("ids", [[[64, 1203, 263], [15339]], [64, 1203, 263]])
async def test_request_of_token_ids_is_refused_and_names_the_cure(encoder: Any, ids: Any) -> None:
    """As LangChain's `OpenAIEmbeddings` makes them, with the vocabulary of another model."""
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        error = error_of(await http.post(PATH, json={"input": ids, "encoding_format": "base64"}), 400)
        assert error["param"] == "input"
        for words in ("check_embedding_ctx_length=False", "--accept-token-ids"):
            assert words in error["message"]


async def test_server_told_to_accept_token_ids_answers_them(encoder: Any, model: Any) -> None:
    ids = model.tokenizer("a heron on the river")["input_ids"]
    async with opened(AsyncEmbedder(encoder), accept_token_ids=True) as service, client(service) as http:
        found = vectors_of(await http.post(PATH, json={"input": [ids]}))
    np.testing.assert_allclose(found, model.encode(["a heron on the river"]), atol=1e-5)


async def test_half_an_emoji_is_replaced_and_answered(encoder: Any, model: Any) -> None:
    """Clients that cut texts by UTF-16 code units send half a surrogate pair, escaped."""
    texts = ["a heron \ud83d", "\ude80 a heron", "a heron \ud83d\ud83d\ude80\ude80", "C:\\ud83d \ud83d"]
    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        found = vectors_of(await http.post(PATH, content=json.dumps({"input": texts})))
    np.testing.assert_allclose(found, model.encode(whole), atol=1e-5)


async def test_byte_order_mark_before_the_body_is_passed_over_and_other_encodings_are_named(encoder: Any) -> None:
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        body = '{"input": "Café"}'
        assert (await http.post(PATH, content=body.encode("utf-8-sig"))).status_code == 200
        for encoding in ("latin-1", "utf-16"):
            error = error_of(await http.post(PATH, content=body.encode(encoding)), 400)
            assert "not UTF-8" in error["message"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Of a server process, beside an HTTP parser that uvicorn would prefer, and that loses bodies."""
    folder = tmp_path_factory.mktemp("parser")
    (folder / "httptools.py").write_text("raise RuntimeError('this parser loses the bodies of requests with Upgrade')")
    with ServerProcess(PYTHONPATH=str(folder)) as server:
        host, port = server.wait_ready().removeprefix("http://").split(":")
        yield host, int(port)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read().splitlines()[1:] == []  # nothing but that it ends


BODY = b'{"input": "a heron"}'
LENGTH = b"Content-Length: %d" % len(BODY)
UPGRADE = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest.mark.parametrize(
    ("line", "headers", "body"),
    [
        (b"POST /v1/embeddings HTTP/1.1", [b"Host: x", LENGTH, *UPGRADE], BODY),
        (b"POST /embeddings HTTP/1.0", [LENGTH], BODY),
        (b"POST http://x/v1/embeddings HTTP/1.1", [b"Host: x", LENGTH], BODY),
        (b"POST /v1/embeddings?api-version=1 HTTP/1.1", [b"Host: x", LENGTH, b"Content-Type: text/plain"], BODY),
        (
            b"POST /v1/embeddings HTTP/1.1",
            [b"Host: x", b"Transfer-Encoding: chunked"],
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        ),
    ],
    ids=["Java offers HTTP/2", "HTTP/1.0", "a proxy's line", "no JSON by its type", "chunked"],
)
def test_request_as_another_http_client_makes_it_is_answered(
    address: tuple[str, int], line: bytes, headers: list[bytes], body: bytes
) -> None:
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(b"\r\n".join([line, *headers, b"", body]))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


ORIGIN = "https://app.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


async def test_paths_without_v1_and_with_slashes_are_answered_without_a_redirect(encoder: Any) -> None:
    paths = ("/embeddings", "/embeddings/", "/v1/embeddings/", "/v1//embeddings")
    async with opened(AsyncEmbedder(encoder), aliases=("minilm", "org/minilm")) as service, client(service) as http:
        for path in paths:
            assert vectors_of(await http.post(path, json={"input": "a heron"})).shape == (1, 384)
        for path in ("/models", "/models/", "/v1/models/"):
            assert len((await http.get(path)).json()["data"]) == 4
        for path in ("/models/org/minilm", "/v1/models/org%2Fminilm/"):
            assert (await http.get(path)).json()["id"] == "org/minilm"
        for path in ("/health/", "/metrics/", "//"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/embeddings/x", "/embeddingsx", "/v1", "/v2/embeddings"):
            assert error_of(await http.post(path, json={"input": "a heron"}), 404)["code"] == "not_found"
        assert error_of(await http.put("/embeddings/"), 405)["code"] == "method_not_allowed"
        figures = (await http.get("/metrics")).text
    assert 'asyncembed_requests_total{path="/v1/embeddings",status="200"} 4.0' in figures.splitlines()


async def test_pages_of_a_named_origin_may_ask_and_their_preflight_needs_no_key(encoder: Any) -> None:
    settings: Any = {"cors_origins": (ORIGIN,), "api_key": "s3cret"}
    async with opened(AsyncEmbedder(encoder), **settings) as service, client(service) as http:
        preflight = await http.options(PATH, headers=PREFLIGHT)
        stranger = await http.options(PATH, headers={**PREFLIGHT, "Origin": "https://else.example.org"})
        unknown = await http.post(PATH, json={"input": "a"}, headers={"Origin": ORIGIN})
        key = {"Authorization": "Bearer s3cret"}
        known = await http.post(PATH, json={"input": "a heron"}, headers={"Origin": ORIGIN, **key})
        bare = await http.options(PATH)
    assert preflight.status_code == 200
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    error_of(unknown, 401)
    error_of(bare, 401)
    assert vectors_of(known).shape == (1, 384)
    for answer in (preflight, unknown, known):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in stranger.headers


async def test_pages_of_any_origin_are_refused_by_the_browser_unless_told(encoder: Any) -> None:
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        error_of(await http.options(PATH, headers=PREFLIGHT), 405)
        answer = await http.post(PATH, json={"input": "a heron"}, headers={"Origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_gzip_body_is_read_and_a_broken_one_is_refused(encoder: Any, model: Any) -> None:
    packed = gzip.compress(b'\xef\xbb\xbf{"input": "a heron"}')
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        found = vectors_of(await http.post(PATH, content=packed, headers={"Content-Encoding": "GZIP"}))
        for body in (packed[:-9], b"{}", packed + b"x"):
            error = error_of(await http.post(PATH, content=body, headers={"Content-Encoding": "gzip"}), 400)
            assert error["code"] == "invalid_gzip"
        error = error_of(await http.post(PATH, content=b"{}", headers={"Content-Encoding": "br"}), 415)
        assert "'br' is not read here" in error["message"]
    np.testing.assert_allclose(found, model.encode(["a heron"]), atol=1e-5)


async def test_gzip_bomb_takes_no_memory(encoder: Any) -> None:
    limit, packer = 2**20, zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(2**22)) for _ in range(16)) + packer.flush()
    async with opened(AsyncEmbedder(encoder), max_body_bytes=limit) as service, client(service) as http:
        tracemalloc.start()
        try:
            answer = await http.post(PATH, content=bomb, headers={"Content-Encoding": "gzip"})
            _, n_peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert "unpacks to more than" in error_of(answer, 413)["message"]
    assert n_peak < 4 * limit


@pytest.mark.parametrize("root", ["/embed", "/v1", "/v1/embeddings"])
async def test_behind_a_proxy_with_a_prefix_it_answers_with_and_without_it(encoder: Any, root: str) -> None:
    async with opened(AsyncEmbedder(encoder), root_path=root, api_key="s3cret") as service, client(service) as http:
        http.headers["Authorization"] = "Bearer s3cret"
        for path in ("/v1/embeddings", "/embeddings/"):
            assert (await http.post(root + path, json={"input": "a heron"})).status_code == 200
        assert (await http.get(f"{root}/health", headers={"Authorization": ""})).status_code == 200
        assert f"http://server{root}/v1/embeddings" in (await http.get(f"{root}/")).text
        if root == "/embed":
            assert (await http.post("/embeddings", json={"input": "a heron"})).status_code == 200
            error_of(await http.post("/embedded/embeddings", json={"input": "a heron"}), 404)


async def test_texts_that_were_cut_are_counted(encoder: Any) -> None:
    async with opened(AsyncEmbedder(encoder, long_texts="truncate")) as service, client(service) as http:
        await http.post(PATH, json={"input": ["a heron", "on the river " * 200, "in the mud " * 300]})
        figures = (await http.get("/metrics")).text
    assert "asyncembed_truncations_total 2.0" in figures.splitlines()


async def test_blank_text_is_answered_as_encode_does_and_its_neighbours_with_it(encoder: Any, model: Any) -> None:
    """A blank is what clients send in the place of an empty text, which OpenAI refuses."""
    texts = ["a heron", " ", "\n\t", "\u3000\u200b"]
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        found = await http.post(PATH, json={"input": texts})
        alone = await http.post(PATH, json={"input": " "})
        error = error_of(await http.post(PATH, json={"input": ["a heron", ""]}), 400)
    np.testing.assert_allclose(vectors_of(found), model.encode(texts), atol=1e-5)
    np.testing.assert_allclose(vectors_of(alone), model.encode([" "]), atol=1e-5)
    assert alone.json()["usage"]["prompt_tokens"] == 0
    assert error["param"] == "input[1]"


async def test_blank_text_of_which_the_model_makes_nothing_is_an_error() -> None:
    """A vector of zeros, or one that is not finite, is never answered."""
    encoder = FakeEncoder()
    encoder.finish = lambda handle: np.zeros((len(handle.chunks), 4), np.float32)  # type: ignore[method-assign]
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        error = error_of(await http.post(PATH, json={"input": " "}), 400)
    assert "zeros" in error["message"]


@pytest.fixture
def prompted(model: Any) -> Iterator[Any]:
    """The real model with a prompt for queries and one of another name."""
    before = dict(model.prompts)
    model.prompts.update({"query": "find: ", "title": "a title: "})
    yield model
    model.prompts.clear()
    model.prompts.update(before)


async def test_input_type_and_prompt_name_choose_the_prompt(prompted: Any) -> None:
    text = "a heron on the river"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"input_type": None, "prompt_name": None, "task": None}, ""),
        ({"input_type": "query"}, "find: "),
        ({"input_type": "search_query"}, "find: "),
        ({"input_type": "document"}, ""),
        ({"input_type": "search_document"}, ""),
        ({"input_type": "passage", "task": "document"}, ""),
        ({"prompt_name": "title"}, "a title: "),
        ({"prompt_name": "query", "task": "query"}, "find: "),
        ({"prompt_name": "title", "input_type": "query"}, "a title: "),
    ]
    async with opened(AsyncEmbedder(prompted)) as service, client(service) as http:
        for fields, prompt in cases:
            found = vectors_of(await http.post(PATH, json={"input": [text], **fields}))
            np.testing.assert_allclose(found, prompted.encode([text], prompt=prompt), atol=1e-5, err_msg=str(fields))


async def test_prompts_of_the_server_serve_models_that_name_none(encoder: Any, model: Any) -> None:
    """Some models want `query: ` before queries and say so on their page only."""
    embedder = AsyncEmbedder(encoder, query_prompt="query: ", document_prompt="passage: ")
    async with opened(embedder) as service, client(service) as http:
        for input_type, prompt in (("query", "query: "), ("passage", "passage: "), (None, "")):
            found = vectors_of(await http.post(PATH, json={"input": TEXTS, "input_type": input_type}))
            np.testing.assert_allclose(found, model.encode(TEXTS, prompt=prompt), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_type", "classification"),
        ("input_type", "Query"),
        ("input_type", ["query"]),
        ("input_type", ""),
        ("prompt_name", "no such"),
        ("prompt_name", "x" * 100_000),
        ("prompt_name", 5),
        ("task", "no such"),
        ("task", {"a": 1}),
    ],
)
async def test_instruction_that_the_model_has_not_is_refused(encoder: Any, field: str, value: Any) -> None:
    async with opened(AsyncEmbedder(encoder)) as service, client(service) as http:
        error = error_of(await http.post(PATH, json={"input": ["a heron"], field: value}), 400)
    assert error["param"] == field
    assert len(error["message"]) < 500


async def test_input_type_and_task_choose_the_route() -> None:
    model = router(allow_empty_key=False)
    async with opened(AsyncEmbedder(model)) as service, client(service) as http:
        for fields, task in (
            ({"input_type": "search_query"}, "query"),
            ({"input_type": "passage"}, "document"),
            ({"task": "query"}, "query"),
            ({"task": "document", "input_type": "query"}, "document"),
        ):
            found = vectors_of(await http.post(PATH, json={"input": TEXTS, **fields}))
            np.testing.assert_allclose(found, model.encode(TEXTS, task=task), atol=1e-5)
        for fields in ({}, {"task": "no such"}):
            error = error_of(await http.post(PATH, json={"input": TEXTS, **fields}), 400)
            assert (error["param"], "'query'" in error["message"]) == ("task", True)


async def test_task_chooses_the_adapter_and_one_that_is_not_there_harms_no_one() -> None:
    model = adapted()
    async with opened(AsyncEmbedder(model)) as service, client(service) as http:
        error = error_of(await http.post(PATH, json={"input": TEXTS, "task": "no such" * 10_000}), 400)
        found = vectors_of(await http.post(PATH, json={"input": TEXTS, "task": "retrieval.query"}))
        plain = vectors_of(await http.post(PATH, json={"input": TEXTS}))
    assert "no such" in error["message"]
    assert len(error["message"]) < 500
    np.testing.assert_allclose(found, model.encode(TEXTS, task="retrieval.query"), atol=1e-5)
    np.testing.assert_allclose(plain, model.encode(TEXTS), atol=1e-5)
