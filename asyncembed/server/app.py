"""The HTTP side: routes, the page for a person, and the bearer key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Iterable
from html import escape
from typing import Any

import anyio
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncembed.embedder import CountedVectors
from asyncembed.server.schema import (
    SERVER,
    ApiError,
    EmbeddingsRequest,
    encode_answer,
    parse_gzip_request,
    parse_request,
)
from asyncembed.server.service import CONTENT_TYPE, Service, unknown_model
from asyncembed.server.settings import ServerSettings

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; border-radius: 4px }
code { font-size: .9em } td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } pre { background: #262626 } }
"""

ENDPOINTS = (
    ("POST /v1/embeddings", "vectors of a text, or of a list of texts"),
    ("GET /v1/models", "the names of the model; /v1/models/NAME for one"),
    ("GET /health", "200 when the model is ready, 503 before and after; never needs a key"),
    ("GET /metrics", "figures for Prometheus"),
    ("GET /", "this page"),
)

_CURL = """curl {url}/v1/embeddings -H 'Content-Type: application/json'{key} \\
  -d '{{"model": "{model}", "input": ["a heron on the river", "a boat at the mooring"]}}'"""

_PYTHON = """from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.embeddings.create(model="{model}", input=["a heron on the river", "a boat at the mooring"])
print(len(answer.data), "vectors of", len(answer.data[0].embedding), "dimensions")"""


def help_page(settings: ServerSettings, url: str, state: str, facts: str) -> str:
    """The page."""
    model = settings.names[0]
    has_key = settings.api_key is not None
    header = ' -H "Authorization: Bearer $ASYNCEMBED_API_KEY"' if has_key else ""
    curl = _CURL.format(url=url, model=model, key=header)
    python = _PYTHON.format(url=url, model=model, key="…" if has_key else "none needed")
    rows = "".join(f"<tr><td><code>{escape(path)}</code></td><td>{escape(what)}</td></tr>" for path, what in ENDPOINTS)
    names = ", ".join(f"<code>{escape(name)}</code>" for name in settings.names)
    limits = (
        f"A request takes up to {settings.max_inputs:,} texts and {settings.max_body_bytes:,} bytes. When too much is "
        "under way the answer is 429 with <code>Retry-After</code>. Texts longer than the model takes are embedded in "
        "chunks and averaged, unless the server was told otherwise. <code>dimensions</code> keeps the first of each "
        "vector and scales it to length 1; <code>encoding_format</code> is <code>float</code> or <code>base64</code>. "
        "<code>input_type</code> (<code>query</code>, <code>document</code>), <code>prompt_name</code> and "
        "<code>task</code> choose one of the model's own prompts and routes."
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>asyncembed: {escape(model)}</title><style>{_STYLE}</style></head><body>
<h1>asyncembed</h1>
<p>Embeddings of <b>{escape(model)}</b>, the way OpenAI serves them. The model is {escape(state)}{escape(facts)}.
It answers to {names}.</p>
<h2>Try it</h2><pre>{escape(curl)}</pre><pre>{escape(python)}</pre>
<h2>Endpoints</h2><table>{rows}</table>
<h2>Limits</h2><p>{limits}</p>
</body></html>
"""


SMALL_BODY = 64 * 2**10
"""Bodies up to so many bytes are parsed on the event loop, in some 60 µs at most: a hop to a thread costs as much."""

SMALL_ANSWER = 8192
"""Answers of so many floats are encoded on the event loop, in some 250 µs at most."""

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""

PIECE = 1 << 16
"""Bytes of an answer that are sent at a time: whether all before were taken shows who reads it."""

GONE = 499
"""The status counted for a client that went away before it had its answer; nobody is told."""


def make_app(service: Service) -> ASGIApp:
    """The ASGI application over a service; its owner runs the service."""
    routes, settings = _Routes(service), service.settings
    app: ASGIApp = Starlette(
        routes=[
            Route("/v1/embeddings", routes.embeddings, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/", routes.page, methods=["GET"]),
        ],
        exception_handlers={ApiError: _tell, HTTPException: _tell_http, Exception: _tell_bug},
    )
    if settings.api_key is not None:
        app = _KeyCheck(app, settings.api_key, frozenset(settings.root_path + path for path in OPEN_PATHS))
    if settings.cors_origins:  # around the lock: browsers send no key ahead of a request, and read why one is refused
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )
    return _Gate(app, service)


class _Gate:
    """Names each path the way the routes do, and counts what was answered."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics
        self._root = service.settings.root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 500
        path = plain_path(scope["path"], self._root)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                message = await _send_most(message, send)
                if await _is_gone(receive):
                    status = GONE
            await send(message)

        try:
            await self._app({**scope, "path": self._root + path, "root_path": self._root}, receive, sending)
        finally:
            self._metrics.observe(_counted(path), status, time.perf_counter() - started)


class _KeyCheck:
    """Lets those in who have the key."""

    def __init__(self, app: ASGIApp, key: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._digest = _digest(key.encode())
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        may_pass = scope["type"] != "http" or scope["path"] in self._open_paths or self._is_right(scope["headers"])
        await (self._app if may_pass else _refused())(scope, receive, send)

    def _is_right(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Digests, so that neither the key's length nor how much of it was right shows in the time this takes.
        return hmac.compare_digest(_digest(key.strip()), self._digest) and scheme.lower() == b"bearer"


class _Routes:
    """What is at each path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts; told that the server ends if it ends before they are done."""
        with anyio.CancelScope() as scope, self._service.under_way(scope):
            return await self._embed(request)
        raise self._service.cut_off()

    async def _embed(self, request: Request) -> Response:
        service = self._service
        if service.condition != "ready":
            raise service.why_not_ready()
        try:
            asked = await self._asked(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        future = service.admit(asked)
        await _until_done(future, request.receive)
        if future.cancelled():
            return Response(status_code=GONE)
        error = future.exception()
        if error is not None:
            if isinstance(error, Exception):
                error = service.explained(error, asked)
            raise error
        answer = future.result()
        service.metrics.count_tokens(sum(answer.n_tokens))
        return Response(await self._encode(answer, asked), media_type="application/json")

    async def models(self, _: Request) -> Response:
        """The model by all its names."""
        found = [self._model(name) for name in self._service.settings.names]
        return _json({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """The model by one name."""
        asked = request.path_params["name"]
        name = next((name for name in self._service.settings.names if name.strip("/") == asked.strip("/")), None)
        if name is None:
            raise unknown_model(asked, self._service.settings)
        return _json(self._model(name))

    async def health(self, _: Request) -> Response:
        """Whether it can answer."""
        condition = self._service.condition
        if condition == "ready" and self._service.embedder.statistics().state != "open":
            condition = "broken"
        return _json({"status": condition}, 200 if condition == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self._service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    async def page(self, request: Request) -> Response:
        """Help."""
        service, facts = self._service, ""
        if service.condition == "ready":
            encoder = service.embedder.encoder
            facts = f": {service.embedder.dim} dimensions, {encoder.backend} in {encoder.dtype} on {encoder.device}"
        url = str(request.base_url).rstrip("/")
        return HTMLResponse(help_page(service.settings, url, service.condition, facts))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._service.created, "owned_by": "asyncembed"}

    async def _asked(self, request: Request) -> EmbeddingsRequest:
        """What the body asks for. The body is held in here only: it is gone before the model is waited for."""
        encoding = request.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip"):
            message = f"a body with Content-Encoding {encoding[:40]!r} is not read here; send it with gzip or with none"
            raise ApiError(415, message, code="unsupported_encoding", headers={"Accept-Encoding": "gzip"})
        settings = self._service.settings
        async with self._service.bodies.read(request) as body:
            if encoding == "gzip":
                return await self._service.worker.run(parse_gzip_request, body, settings)
            if len(body) <= SMALL_BODY:
                return parse_request(body, settings)
            return await self._service.worker.run(parse_request, body, settings)

    async def _encode(self, answer: CountedVectors, asked: EmbeddingsRequest) -> bytes:
        model = asked.model or self._service.settings.names[0]
        if answer.vectors.size <= SMALL_ANSWER:
            return encode_answer(answer, asked, model)
        return await self._service.worker.run(encode_answer, answer, asked, model)


async def _until_done(future: asyncio.Future[CountedVectors], receive: Receive) -> None:
    """Wait for the answer, or cancel it when the client goes away. Cancelled, it cancels it too."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        future.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            await asyncio.wait([future])
            group.cancel_scope.cancel()
    finally:
        future.cancel()


async def _tell(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error.response()


async def _tell_http(request: Request, error: Exception) -> Response:
    """What the framework refuses: a path or a method that is not there."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        told = ApiError(404, f"there is nothing at {request.url.path}; {_PATHS}", code="not_found")
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
        told = ApiError(405, message, code="method_not_allowed", headers=error.headers)
    else:
        told = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return told.response()


async def _tell_bug(_: Request, error: Exception) -> Response:
    """An error that nobody foresaw; the framework raises it again for the log."""
    return ApiError(500, f"unexpected {type(error).__name__}; the server's log has more", kind=SERVER).response()


async def _send_most(message: Message, send: Send) -> Message:
    """Send a body but for its last piece, which is returned; waits while the client does not read."""
    body = message.get("body", b"")
    last = max(0, len(body) - 1) // PIECE * PIECE
    for start in range(0, last, PIECE):
        await send({"type": message["type"], "body": body[start : start + PIECE], "more_body": True})
    return {**message, "body": body[last:]} if last else message


async def _is_gone(receive: Receive) -> bool:
    """Whether the client has gone away, as far as is known now."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        return bool((await receive())["type"] == "http.disconnect")
    return False


_PATHS = "see / for help"
_API = re.compile(r"/+(?:v1/+)?(embeddings/*|models(?:/.*)?)", re.DOTALL)
_ORIGIN = re.compile(r"^https?://[^/]*")
_KNOWN = frozenset({"/v1/embeddings", "/v1/models", "/health", "/metrics", "/"})


def plain_path(path: str, root: str) -> str:
    """A path the way the routes name it: without a proxy's prefix and slashes at the end, and under `/v1`."""
    path = _ORIGIN.sub("", path)  # clients that take this for a proxy send the whole URL
    if path == root or path.startswith(f"{root}/"):  # some proxies take it off, some do not
        path = path[len(root) :]
    found = _API.fullmatch(path)
    return (f"/v1/{found[1]}" if found else path).rstrip("/") or "/"


def _counted(path: str) -> str:
    """The path as it is counted: a client cannot make new ones."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in _KNOWN else "other"


def _refused() -> Response:
    message = "a key is needed, as 'Authorization: Bearer KEY', and it must be the right one"
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers).response()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
