"""asyncembed behind LangChain's `Embeddings`. Needs langchain-core."""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any

from langchain_core.embeddings import Embeddings

from asyncembed.embedder import AsyncEmbedder, Kind
from asyncembed.embedder.requests import HowOptions, check_how
from asyncembed.errors import AsyncEmbedError, ClosedError, TextTypeError
from asyncembed.options import DEFAULT_MODEL
from asyncembed.threads import LoopThread, watch
from asyncembed.wording import why_no_text


class AsyncEmbedEmbeddings(Embeddings):
    """LangChain's `Embeddings` on an `AsyncEmbedder`: synchronous and asynchronous calls share its batches.

    Given an open embedder, it uses that one, and leaves it open. Given a model, it opens an embedder of its own at the
    first call, on a loop in a thread of its own; `close` ends it, as does leaving a `with` block.

    Queries are embedded with the model's prompt for queries, documents with the one for documents. A text without
    tokens, such as a blank page, gets the vector that the model's `encode` gives it.

    Args:
        model: An open `AsyncEmbedder`; or a name, a path, a `SentenceTransformer`, or an `Encoder`.
        query_prompt: Put before queries, whatever prompts model and embedder have.
        document_prompt: The same for documents.
        **options: The options of an `AsyncEmbedder` of its own.

    Raises:
        TypeError: Options were given for an embedder that is there already.
    """

    def __init__(
        self,
        model: Any = DEFAULT_MODEL,
        *,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        **options: Any,
    ) -> None:
        self._how: dict[Kind, HowOptions] = {
            "query": {"kind": "query", "prompt": query_prompt, "blanks": "encode"},
            "document": {"kind": "document", "prompt": document_prompt, "blanks": "encode"},
        }
        for how in self._how.values():
            check_how(how)  # refuses what is no text
        if isinstance(model, AsyncEmbedder) and options:
            raise TypeError(f"the embedder has its options already: {', '.join(options)} cannot be given again")
        self._given = model if isinstance(model, AsyncEmbedder) else None
        self._make = partial(AsyncEmbedder, model, **options)
        if self._given is None:
            self._make()  # refuses options that cannot be now, not in the thread
        self.__setstate__(self.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of: a copy opens an embedder of its own, unless it uses one that was given."""
        return {name: self.__dict__[name] for name in ("_how", "_given", "_make")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._thread: LoopThread | None = None
        self._opening: Future[AsyncEmbedder] = Future()
        self._starting = threading.Lock()
        self._closed = False
        watch(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncEmbedEmbeddings:
        """An embedder that was given is shared."""
        made, state = type(self).__new__(type(self)), self.__getstate__()
        made.__setstate__(state if self._given is not None else copy.deepcopy(state, memo))
        return made

    def orphan(self) -> None:
        """This is a child process, made by a fork: its own embedder is the parent's, so another is opened."""
        if not self._closed:
            self.__setstate__(self.__getstate__())

    def __repr__(self) -> str:
        return f"<AsyncEmbedEmbeddings {self._given or self._thread or 'not used yet'!r}>"

    def __enter__(self) -> AsyncEmbedEmbeddings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the embedder of its own, if it has one. Idempotent."""
        with self._starting:  # or a call could start a thread after this, and nobody would end it
            self._closed, thread, self._thread = True, self._thread, None
        if thread is not None:
            if not self._opening.exception():
                thread.submit(self._opening.result().aclose)
            thread.close()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A list of floats for each text. Not from the event loop of the embedder given: await `aembed_documents`."""
        return self._wait(_documents(texts), "document")

    def embed_query(self, text: str) -> list[float]:
        """A list of floats. Not from the event loop of the embedder given: await `aembed_query`."""
        return self._wait(_query(text), "query")[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """A list of floats for each text. Cancelled, the work is dropped."""
        return await self._ask(_documents(texts), "document")

    async def aembed_query(self, text: str) -> list[float]:
        """A list of floats. Cancelled, the work is dropped."""
        return (await self._ask(_query(text), "query"))[0]

    async def _ask(self, texts: list[str], kind: Kind) -> list[list[float]]:
        embedder = self._given
        if embedder is None:  # shielded: a caller that is cancelled while the model loads must not take it from others
            embedder = await asyncio.shield(asyncio.wrap_future(self._own()))
        rows: list[list[float]] = (await embedder.embed(texts, **self._how[kind])).tolist()
        return rows

    def _wait(self, texts: list[str], kind: Kind) -> list[list[float]]:
        embedder = self._given or self._own().result()
        if embedder.is_on_its_loop():
            name = "query" if kind == "query" else "documents"
            raise AsyncEmbedError(
                f"embed_{name} would block the event loop that has to answer it; await aembed_{name} there"
            )
        rows: list[list[float]] = embedder.embed_threadsafe(texts, **self._how[kind]).result().tolist()
        return rows

    def _own(self) -> Future[AsyncEmbedder]:
        with self._starting:
            if self._closed:
                raise ClosedError("these embeddings are closed; make others")
            if self._thread is None:
                self._thread = LoopThread("asyncembed-embedder")
                self._opening = self._thread.submit(self._make().__aenter__)
            return self._opening


def _documents(texts: list[str]) -> list[str]:
    if isinstance(texts, str):
        raise TextTypeError("embed_documents takes a list of texts, not one text; pass [text]")
    return texts


def _query(text: object) -> list[str]:
    if not isinstance(text, str):
        raise TextTypeError(why_no_text("the query", text))
    return [text]
