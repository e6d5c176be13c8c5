"""Errors as OpenAI's service tells them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

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
