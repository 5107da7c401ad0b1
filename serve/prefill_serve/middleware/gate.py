"""The gate in front of the API: request id, origin, key and body limits of every request, and its metrics.

Plain ASGI, so that a refusal is cheap and a body over the limit is never held in memory as a whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from http import HTTPStatus
from time import perf_counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefill_serve.endpoint import Endpoint, new_request_id
from prefill_serve.http_errors import Refusal
from prefill_serve.middleware import attempts
from prefill_serve.middleware.origins import has_allowed_host, has_json_or_nothing, is_from_own_page
from prefill_serve.traces import request_span

log = logging.getLogger("ray.serve")

PROBES = ("/health", "/ready")  # any Host is accepted: Kubernetes probes pods by address
# Paths that need no key: probes and public pages.
OPEN_PATHS = (*PROBES, "/openapi.json", "/docs", "/playground.")
_BODY_S = 60.0  # limit on the whole body; without one, a slow sender would hold a connection for ever
HUNG_UP = 499  # nginx's status for a caller that disconnected; only for metrics and logs
_REQUEST_ID = re.compile(r"[!-~]{1,200}")


class RequestGate:
    """ASGI middleware around the API of an endpoint."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint, *, names_requests: bool = True) -> None:
        """`names_requests` adds the header x-request-id to answers; Ray Serve adds it itself."""
        self.app, self.endpoint, self.names_requests = app, endpoint, names_requests
        self.attempts = attempts.RequestAttempts.of_environment()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"], state["caller"] = request_id, ""
        limits = self.endpoint.serving.settings.limits if self.endpoint.serving else None
        body = _BodyReader(receive, limits.body_bytes if limits else None)
        status = 0  # until the answer starts

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = HUNG_UP if body.has_left else message["status"]
                if self.names_requests:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with request_span(scope) as span:
            try:
                self._require_own_origin(scope["path"], headers)
                state["caller"] = self._caller(scope["path"], headers)
                if not has_json_or_nothing(headers):
                    raise _not_json()
                with self.attempts.begun(headers.get(attempts.HEADER), request_id):
                    body.require_length(headers.get("content-length", ""))
                    await self.app(scope, body, send_with_id)
            except Refusal as refusal:
                await refusal.response_at(scope["path"])(scope, receive, send_with_id)
            except attempts.TooManyDeaths:
                lost = Refusal(500, attempts.MESSAGE, attempts.CODE, headers=attempts.NOT_AGAIN)
                await lost.response_at(scope["path"])(scope, receive, send_with_id)
            except asyncio.CancelledError:  # Ray Serve cancels when the caller disconnects
                body.has_left = True
                raise
            finally:
                status = status or (HUNG_UP if body.has_left else 500)
                route = getattr(scope.get("route"), "path", "none")  # unknown paths share one label
                self.endpoint.metrics.request(route, status, perf_counter() - started)
                span.set_attributes({"http.route": route, "http.response.status_code": status, "id": request_id})
                if status >= 400:
                    fields = {"route_id": request_id, "status": status, "route": route}
                    log.warning("caller disconnected" if status == HUNG_UP else "request refused", extra=fields)

    def _require_own_origin(self, path: str, headers: Headers) -> None:
        """Blocks other sites' pages if no key does. Raises Refusal for a disallowed Host or a cross-site request."""
        settings = self.endpoint.serving.settings if self.endpoint.serving is not None else None
        if settings is None or path in PROBES or not (settings.open or settings.allowed_hosts):
            return
        if not has_allowed_host(headers, settings.allowed_hosts):
            message = "Host header not allowed: use localhost, or start the endpoint with --allowed-hosts NAME"
            raise Refusal(403, message, "host_not_allowed")
        if settings.open and not _is_open_path(path) and not is_from_own_page(headers):
            message = "cross-site request refused: an endpoint for web pages of other sites needs --keys"
            raise Refusal(403, message, "origin_not_allowed")

    def _caller(self, path: str, headers: Headers) -> str:
        """Returns the key's caller. Compares all keys, each in constant time, so that timing reveals nothing."""
        serving = self.endpoint.serving
        if serving is None or serving.settings.open or _is_open_path(path):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # Anthropic's clients send either
            key = headers.get("x-api-key", "")
        given = f"sha256:{hashlib.sha256(key.strip().encode('utf-8', 'replace')).hexdigest()}"
        matches = [name for name, known in serving.settings.keys.items() if hmac.compare_digest(given, known)]
        if not matches:
            message = "missing or invalid key: send the header Authorization: Bearer KEY, or x-api-key: KEY"
            raise Refusal(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        return matches[0]


class _BodyReader:
    """The `receive` of a request: limits the body's size and time, and notes when the caller disconnects."""

    def __init__(self, receive: Receive, max_bytes: int | None, seconds: float = _BODY_S) -> None:
        self._receive, self._max_bytes, self._seconds = receive, max_bytes, seconds
        self._num_bytes, self._deadline, self._is_whole = 0, 0.0, False
        self.has_left = False

    def require_length(self, stated: str) -> None:
        """Raises Refusal if a Content-Length exceeds the limit. Python does not convert more than 4,300 digits."""
        digits, limit = stated.lstrip("0"), self._max_bytes
        if limit is not None and digits.isdecimal() and (len(digits) > len(str(limit)) or int(digits) > limit):
            raise _too_large(limit)

    async def __call__(self) -> Message:
        """Raises Refusal once the body exceeds the limit, or if it is incomplete `seconds` after the first call."""
        message = await self._next()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        return message

    async def _next(self) -> Message:
        if self._is_whole:  # the next message is the caller's disconnect, which may come as late as the answer
            return await self._receive()
        self._deadline = self._deadline or asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            message = f"body incomplete after {self._seconds:g} s"
            raise Refusal(408, message, "request_timeout", headers={"connection": "close"}) from None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"body too large: must have at most {limit:,} bytes", "request_too_large")


def phrase(status: int) -> str:
    """The reason phrase of a status, for Starlette's errors on paths and methods."""
    return HTTPStatus(status).phrase.lower()


def _is_open_path(path: str) -> bool:
    return path == "/" or path.startswith(OPEN_PATHS)


def _not_json() -> Refusal:
    message = "the body must be JSON: send the header Content-Type: application/json"
    return Refusal(415, message, "unsupported_media_type")
