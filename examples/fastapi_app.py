"""A FastAPI app with one model in it. Run it with: uvicorn examples.fastapi_app:app (needs fastapi and uvicorn)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from asyncembed import AsyncEmbedder, DeadlineError, OverloadedError, TextError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncEmbedder("all-MiniLM-L6-v2", cache_bytes="64MB") as embedder:  # loads; at the end it drains
        app.state.embedder = embedder
        yield


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    query: str
    passages: list[str]


@app.post("/rank")
async def rank(question: Question, request: Request) -> list[str]:
    """The passages, the nearest to the query first. Requests that come together share batches."""
    embedder: AsyncEmbedder = request.app.state.embedder
    try:
        query = await embedder.embed_query(question.query, deadline_s=30)
        passages = await embedder.embed_document(question.passages, deadline_s=30)
    except TextError as error:
        raise HTTPException(422, str(error)) from error
    except (OverloadedError, DeadlineError) as error:
        raise HTTPException(503, str(error)) from error
    return [question.passages[place] for place in (passages @ query).argsort()[::-1]]


@app.get("/health")
async def health(request: Request) -> dict[str, object]:
    return request.app.state.embedder.statistics()._asdict()
