"""The API key."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from q_serve.api.errors import ApiError

OPEN_ROUTES = frozenset({"/health", "/ready"})


class RequireKey:
    """Middleware that lets only requests with the right ``Authorization: Bearer`` header through, compared in constant time.

    Args:
        app: what is behind it.
        key: the right key.
    """

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN_ROUTES:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    401,
                    "missing or wrong API key; send it as «Authorization: Bearer KEY»",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)
