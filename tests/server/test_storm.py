"""Many clients of all kinds at once: each is answered as it deserves, and nothing is left of those who went away."""

from __future__ import annotations

import random
from collections import Counter

import anyio
import orjson
import pytest

from asyncembed import AsyncEmbedder
from tests.embedder.doubles import at_rest, until, vector
from tests.fakes import FakeEncoder

from .running import listening, opened

pytestmark = pytest.mark.usefixtures("no_leftovers")

KINDS = ("text", "list", "poison", "broken", "huge", "leaves", "leaves while sending")


def body_of(kind: str, number: int) -> bytes:
    asked = {"text": f"note {number}", "list": [f"note {number}", "a heron"], "poison": ["a heron", "word " * 99]}
    if kind in asked:
        return orjson.dumps({"input": asked[kind]})
    return {"broken": b'{"input": [}', "huge": b" " * 5000}.get(kind, b'{"input": "nobody waits for this"}')


async def one(kind: str, number: int, port: int, answers: list[tuple[str, int, bytes]]) -> None:
    """A client of a kind."""
    body = body_of(kind, number)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        if kind == "leaves while sending":
            await stream.send(head + body[:5])
            return
        await stream.send(head + body)
        if kind == "leaves":
            return
        answer = b"".join([piece async for piece in stream])
    status, content = int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]
    answers.append((kind, number, b"%d " % status + content))


@pytest.mark.parametrize("seed", range(3))
async def test_storm_of_clients(seed: int) -> None:
    dice = random.Random(seed)
    kinds = [dice.choice(KINDS) for _ in range(120)]
    answers: list[tuple[str, int, bytes]] = []
    embedder = AsyncEmbedder(FakeEncoder(slots=2), long_texts="error")
    async with opened(embedder, max_body_bytes=4000) as service, listening(service) as port:
        async with anyio.create_task_group() as group:
            for number, kind in enumerate(kinds):
                group.start_soon(one, kind, number, port, answers)
        await until(lambda: at_rest(embedder) and service.bodies.n_bytes == 0)
    expected = {"text": b"200", "list": b"200", "poison": b"400", "broken": b"400", "huge": b"413"}
    stayed = Counter(kind for kind in kinds if kind in expected)
    assert Counter(kind for kind, _, _ in answers) == stayed
    for kind, number, answer in answers:
        status, _, content = answer.partition(b" ")
        assert status == expected[kind], (kind, answer)
        if status == b"200":
            assert orjson.loads(content)["data"][0]["embedding"] == vector(f"note {number}")
