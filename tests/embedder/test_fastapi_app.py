"""examples/fastapi_app.py, with its lifespan, asked over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
from types import ModuleType

import httpx
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastapi_app", ROOT / "examples" / "fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_example_ranks_passages_for_many_at_once_and_refuses_what_cannot_be(example: ModuleType) -> None:
    app = example.app
    transport = httpx.ASGITransport(app)
    passages = ["Knead the dough twice.", "The heron waits in the reeds."]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://example", timeout=60) as client,
    ):
        asked = [{"query": query, "passages": passages} for query in ("a bird by the water", "how to make bread")]
        answers = await asyncio.gather(*(client.post("/rank", json=question) for question in asked))
        assert [answer.json()[0] for answer in answers] == [passages[1], passages[0]]
        refused = await client.post("/rank", json={"query": " ", "passages": passages})
        assert refused.status_code == 422
        assert "the text has no tokens" in refused.json()["detail"]
        assert (await client.get("/health")).json()["state"] == "open"
    assert app.state.embedder.statistics().state == "closed"
