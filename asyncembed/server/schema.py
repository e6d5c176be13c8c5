"""What comes in and goes out at `/v1/embeddings`: bodies read and written, and every error in one shape."""

from __future__ import annotations

import base64
import gzip
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import anyio
import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from asyncembed.embedder import CountedVectors, Kind
from asyncembed.encoders import FloatMatrix
from asyncembed.engine.work import normalized
from asyncembed.records import AnyText, TokenText
from asyncembed.server.settings import ServerSettings

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def response(self) -> Response:
        """The answer."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        content = orjson.dumps({"error": told})
        return Response(content, self.status, self.headers, media_type="application/json")


def overloaded(message: str, retry_after_s: int) -> ApiError:
    """There is no room now."""
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, kind="rate_limit_error", code="overloaded", headers=headers)


def unavailable(message: str, code: str, retry_after_s: int | None = None) -> ApiError:
    """The model is not there: not yet, or not any more."""
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else None
    return ApiError(503, message, kind=SERVER, code=code, headers=headers)


def too_large(message: str, code: str = "request_too_large") -> ApiError:
    """The request is larger than the server takes."""
    return ApiError(413, message, code=code)


READ_S = 60.0
"""Seconds a body may take to arrive: one that stalls would hold its room for ever."""

SMALL_BYTES = 1 << 16
"""A body up to this size is read whatever else is: large ones that are slow must not shut all others out."""


class Bodies:
    """Counts the bytes of bodies that are held, being read or waiting to be parsed."""

    def __init__(self, max_bytes: int, max_total_bytes: int, read_s: float = READ_S) -> None:
        self.max_bytes = max_bytes
        self.max_total_bytes = max(max_bytes, max_total_bytes)
        self.small_bytes = SMALL_BYTES
        self.read_s = read_s
        self.n_bytes = 0

    def __repr__(self) -> str:
        return f"<Bodies {self.n_bytes}/{self.max_total_bytes} bytes>"

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, held for the time of the block."""
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large(f"{int(declared)} bytes")
        pieces: list[bytes] = []
        try:
            await self._receive(request, pieces)
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self.n_bytes -= sum(map(len, pieces))

    async def _receive(self, request: Request, pieces: list[bytes]) -> None:
        n_bytes = 0
        try:
            with anyio.fail_after(self.read_s):
                async for piece in request.stream():
                    pieces.append(piece)
                    n_bytes += len(piece)
                    self.n_bytes += len(piece)
                    if n_bytes > self.max_bytes:
                        raise self._too_large(f"more than {self.max_bytes} bytes")
                    if n_bytes > self.small_bytes and self.n_bytes > self.max_total_bytes:
                        raise overloaded("too many large requests are being read; try again later", 1)
        except TimeoutError:
            message = f"the body did not arrive within {self.read_s:g} seconds"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None

    def _too_large(self, size: str) -> Exception:
        return too_large(f"the body has {size}; this server takes {self.max_bytes}; send fewer texts in a request")


FORMATS = ("float", "base64")

KINDS: dict[str | None, Kind] = {
    None: "text",
    "query": "query",
    "search_query": "query",
    "document": "document",
    "search_document": "document",
    "passage": "document",
}
"""What the values of `input_type` mean that clients of several services send."""

ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F]..)|.)", re.DOTALL)
"""An escape of JSON: a whole surrogate pair, half of one, or any other."""

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

TOKEN_IDS_REFUSED = (
    "'input' holds token ids, which mean other words in another model's vocabulary: send strings (LangChain's "
    "OpenAIEmbeddings does with check_embedding_ctx_length=False). For clients that have this model's own tokenizer, "
    "start the server with --accept-token-ids"
)


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """What a client asks for.

    Attributes:
        inputs: The texts, or their token ids.
        is_list: Whether several were asked for, be it a list of one.
        model: The name it gives the model; None if it names none.
        encoding_format: `float` or `base64`.
        dimensions: How many of each vector's; None for all.
        kind: What the texts are for.
        prompt_name: Name of one of the model's prompts; None for that of the kind.
        task: Name of one of the model's routes or adapters; None for that of the kind.
    """

    inputs: list[AnyText]
    is_list: bool
    model: str | None
    encoding_format: str
    dimensions: int | None
    kind: Kind = "text"
    prompt_name: str | None = None
    task: str | None = None


def parse_request(body: bytes, settings: ServerSettings) -> EmbeddingsRequest:
    """Read the body of a request."""
    asked = _loads(body)
    if not isinstance(asked, dict):
        raise ApiError(400, f"the body is a JSON {_kind(asked)}; it must be an object with 'input' and 'model'")
    form, dimensions, input_type = asked.get("encoding_format"), asked.get("dimensions"), asked.get("input_type")
    for name in ("model", "prompt_name", "task"):
        if not isinstance(asked.get(name), str | None):
            raise ApiError(400, f"'{name}' must be a string, not {_kind(asked[name])}", param=name)
    if form is not None and form not in FORMATS:
        raise ApiError(
            400, f"'encoding_format' must be 'float' or 'base64', not {_shown(form)}", param="encoding_format"
        )
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise ApiError(
            400, f"'dimensions' must be a whole number of at least 1, not {_shown(dimensions)}", param="dimensions"
        )
    if not isinstance(input_type, str | None) or input_type not in KINDS:
        known = ", ".join(f"'{name}'" for name in KINDS if name)
        raise ApiError(400, f"'input_type' must be one of {known}, not {_shown(input_type)}", param="input_type")
    if asked.get("input") is None:
        raise ApiError(400, "'input' is missing: a string, or a list of strings", param="input")
    inputs, is_list = _inputs(asked["input"], settings.max_inputs)
    if isinstance(inputs[0], TokenText) and not settings.accept_token_ids:
        raise ApiError(400, TOKEN_IDS_REFUSED, param="input", code="token_ids_not_accepted")
    return EmbeddingsRequest(
        inputs,
        is_list,
        asked.get("model"),
        form or "float",
        dimensions,
        KINDS[input_type],
        asked.get("prompt_name"),
        asked.get("task"),
    )


def parse_gzip_request(packed: bytes, settings: ServerSettings) -> EmbeddingsRequest:
    """Read a body that was compressed; no more of it is unpacked than a body may have."""
    try:
        body = gzip.GzipFile(fileobj=BytesIO(packed)).read(settings.max_body_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ApiError(400, f"the body cannot be unpacked: {error}", code="invalid_gzip") from None
    if len(body) > settings.max_body_bytes:
        raise too_large(f"the body unpacks to more than the {settings.max_body_bytes} bytes that this server takes")
    return parse_request(body, settings)


def _loads(body: bytes) -> Any:
    """The JSON of a body, also after a byte order mark, and with half an emoji: clients cut texts by code units."""
    body = body.removeprefix(BOM_UTF8)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"the body is no JSON that can be read: {error}"
    try:
        body.decode()
        if SURROGATE.search(body) is None:
            raise ApiError(400, message, code="invalid_json")
        return orjson.loads(ESCAPE.sub(lambda found: rb"\ufffd" if found["half"] else found[0], body))
    except UnicodeDecodeError:
        message = "the body is not UTF-8; clients that name it send it: 'Content-Type: application/json; charset=utf-8'"
    except orjson.JSONDecodeError:
        pass  # that was not what was wrong with it
    raise ApiError(400, message, code="invalid_json")


def cut(vectors: FloatMatrix, dimensions: int | None) -> FloatMatrix:
    """The first dimensions of each vector, shape `(n, dimensions)`, scaled to length 1; all as they are for None."""
    return vectors if dimensions is None else normalized(vectors[:, :dimensions])


def encode_answer(answer: CountedVectors, asked: EmbeddingsRequest, model: str) -> bytes:
    """The body of the answer.

    A vector at a time: the interpreter can turn to another thread in between, where one call for all of a large
    answer would hold it.
    """
    vectors = np.ascontiguousarray(cut(answer.vectors, asked.dimensions), "<f4")
    encode = _as_base64 if asked.encoding_format == "base64" else _as_floats
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, encode(vector))
        for index, vector in enumerate(vectors)
    )
    n_tokens = sum(answer.n_tokens)
    head = b'{"object":"list","data":[%b],"model":%b,' % (data, orjson.dumps(model))
    return head + b'"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (n_tokens, n_tokens)


def _as_floats(vector: Any) -> bytes:
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def _as_base64(vector: Any) -> bytes:
    return b'"%b"' % base64.b64encode(vector)


def _inputs(given: Any, max_inputs: int) -> tuple[list[AnyText], bool]:
    # 1. A string. 2. A list of strings. 3. Token ids. 4. A list of token ids.
    if isinstance(given, str):
        return [_text(given, "input")], False
    if not isinstance(given, list):
        raise ApiError(400, f"'input' must be a string or a list, not {_kind(given)}", param="input")
    if not given:
        raise ApiError(400, "'input' is an empty list", param="input")
    kinds = set(map(type, given))
    if kinds == {int}:
        return [_ids(given, "input")], False
    if kinds not in ({str}, {list}):
        raise ApiError(
            400,
            "'input' must hold strings only, or token ids only, or lists of token ids only; "
            f"this list holds {', '.join(sorted(map(_name, kinds)))}",
            param="input",
        )
    if len(given) > max_inputs:
        message = f"'input' holds {len(given)} texts; this server takes {max_inputs} in a request"
        raise ApiError(400, message, param="input")
    read = _text if kinds == {str} else _ids
    return [read(one, f"input[{index}]") for index, one in enumerate(given)], True


def _text(text: str, place: str) -> AnyText:
    if not text:
        raise ApiError(400, f"'{place}' is an empty string", param=place)
    return text


def _ids(ids: Sequence[Any], place: str) -> AnyText:
    if not ids:
        raise ApiError(400, f"'{place}' is an empty list", param=place)
    if set(map(type, ids)) != {int}:
        raise ApiError(400, f"'{place}' is a list: it must hold whole numbers only, token ids", param=place)
    try:
        return TokenText.of(ids)
    except OverflowError:
        raise ApiError(400, f"'{place}' holds a number that is no token id of any vocabulary", param=place) from None


_NAMES = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}


def _name(kind: type) -> str:
    return _NAMES.get(kind, "null")


def _kind(value: Any) -> str:
    return _name(type(value))


def _shown(value: Any) -> str:
    """A value for a message, in some 40 characters: of lists and objects the kind, as they may be nested very deep."""
    if isinstance(value, list | dict):
        return _kind(value)
    shown = repr(value[:40] if isinstance(value, str) else value)  # not of megabytes, to throw most of it away
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
