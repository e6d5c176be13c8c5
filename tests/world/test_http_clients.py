"""What other people's clients send to the server: answered with the right vectors, or refused in one clear line."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from asyncembed import AsyncEmbedder
from tests.server.running import client, opened

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


@pytest.mark.parametrize("ids", [[[64, 1203, 263], [15339]], [64, 1203, 263], [[64], 1203]])
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
