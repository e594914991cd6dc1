"""Middleware of the server: who may use the API, and counts of requests."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics


class Guard:
    """Lets only clients with a key use the API or, without keys, only clients that name the server by its address."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] | None, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts
        self._keys = None if keys is None else [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        if error is not None:
            await JSONResponse(error.body(), error.status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._keys is None:
            name = _host_name(headers.get("host", ""))
            if name in self._hosts:
                return None
            return ApiError(
                403, f"the server is not known as {name!r}: it answers at {self._hosts[0]}", code="wrong_host"
            )
        if not scope["path"].startswith("/v1/"):
            return None
        given = headers.get("authorization", "").encode()
        if any([hmac.compare_digest(given, key) for key in self._keys]):  # all of them: time tells nothing
            return None
        return ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


class Counted:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
