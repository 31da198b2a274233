"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from q_serve.api import errors
from q_serve.api.auth import RequireKey
from q_serve.api.errors import ApiError
from q_serve.api.generation import Answer
from q_serve.api.responses import ChatShape, CompletionShape, Shape
from q_serve.api.schemas import ChatRequest, CompletionRequest, GenerationRequest, parse
from q_serve.api.service import Service

STALLED_SECONDS = 10.0
"""A step that takes longer than this counts as hung, and /ready says so."""


def create_app(service: Service, *, api_key: str | None, max_body_bytes: int) -> FastAPI:
    """Make the app.

    Args:
        service: what answers.
        api_key: if set, what every route but /health and /ready asks for.
        max_body_bytes: largest request body.
    """
    app = FastAPI(title="q-serve", docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    if api_key is not None:
        app.add_middleware(RequireKey, key=api_key)
    started = int(time.time())
    card = {"id": service.model_name, "object": "model", "created": started, "owned_by": "q-serve"} | {
        "max_model_len": service.max_model_len
    }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        thread = service.client.thread
        reason = service.client.closed
        if reason is None and not thread.alive:
            reason = "the engine is not running"
        if reason is None and thread.seconds_in_step > STALLED_SECONDS:
            reason = f"the engine has made no progress for {thread.seconds_in_step:.0f} s"
        return JSONResponse({"status": reason or "ok"}, 503 if reason else 200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model_name:
            raise ApiError(404, f"model {name!r} is not served here; {service.model_name!r} is", code="model_not_found")
        return card

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        request = parse(CompletionRequest, await _read_body(http, max_body_bytes))
        return await _respond(http, request, await service.complete(request), CompletionShape(service.model_name))

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        request = parse(ChatRequest, await _read_body(http, max_body_bytes))
        return await _respond(http, request, await service.chat(request), ChatShape(service.model_name))

    return app


class _EventStream(StreamingResponse):
    """Server-sent events that end their answer with them, even if the client is gone before the first."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _respond(http: Request, request: GenerationRequest, answer: Answer, shape: Shape) -> Response:
    if request.stream:
        return _EventStream(answer, shape.events(answer, include_usage=request.include_usage))
    try:
        await _until_disconnect(http, answer.complete())
    finally:
        answer.close()
    return JSONResponse(shape.answer(answer))


async def _read_body(http: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    return bytes(body)


async def _until_disconnect(http: Request, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; if the client goes away first, stop it."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client went away")
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
