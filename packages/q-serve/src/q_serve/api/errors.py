"""Errors as OpenAI's API shapes them."""

from __future__ import annotations

import logging
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        param: the field at fault, if one is.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that says why."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str) -> ApiError:
    """A 429: come again."""
    return ApiError(429, message, type="rate_limit_error", code="overloaded", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """A 503: this server is going or gone."""
    return ApiError(503, message, type="server_error", code="unavailable", headers={"Retry-After": "5"})


def invalid_fields(error: ValidationError) -> ApiError:
    """A 400 that names the first field at fault, and all of them in words."""
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        name = ".".join(map(str, problem["loc"]))
        problems.append((name, f"{name}: {problem['msg'].removeprefix('Value error, ')}"))
    return bad_request("; ".join(text for _, text in problems[:5]), param=problems[0][0])


def install(app: FastAPI) -> None:
    """Answer every error of an app in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; the client learns nothing of our insides.
        return ApiError(500, "the server failed on this request", type="server_error").response
