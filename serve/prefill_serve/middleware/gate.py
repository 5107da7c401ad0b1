"""What every request passes before the API sees it: an id, checks of its origin, a key and a limit on its body.

It counts requests too. Plain ASGI, so that a refusal costs nothing and a body that is too long is never held whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from time import perf_counter

from opentelemetry import propagate
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefill_serve.endpoint import Endpoint, new_request_id
from prefill_serve.middleware import attempts
from prefill_serve.middleware.arrival import MOST_S, in_time
from prefill_serve.middleware.origins import has_allowed_host, has_json_or_nothing, is_from_own_page
from prefill_serve.traces import tracer
from prefill_serve.wire import error_body

log = logging.getLogger("ray.serve")

PROBES = ("/health", "/ready")  # asked by any name, as Kubernetes does by a pod's address
# No key is asked for: probes, and what anyone may know.
OPEN_PATHS = (*PROBES, "/openapi.json", "/docs", "/playground.")
HUNG_UP = 499  # a caller that did not wait for its answer, as nginx says it; nobody reads it
_REQUEST_ID = re.compile(r"[!-~]{1,200}")


class Refusal(HTTPException):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.body = error_body(status, message, code, param)

    @property
    def response(self) -> Response:
        # json escapes what is no Unicode: a request may have held it, and a message quotes it.
        return Response(json.dumps(self.body), self.status_code, self.headers, "application/json")


class RequestGate:
    """ASGI middleware around the API of an endpoint."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint, *, names_requests: bool = True) -> None:
        """`names_requests`: answers have the request's id among their headers, which a server may do itself."""
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
        state["request_id"], state["holder"] = request_id, ""
        status, has_left = 0, False  # 0 until there is an answer

        async def receive_or_left() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or message["type"] == "http.disconnect"
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = HUNG_UP if has_left else message["status"]
                if self.names_requests:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with tracer.start_as_current_span("request", propagate.extract(headers)) as span:
            propagate.inject(MutableHeaders(scope=scope))  # FastAPI takes its spans' parent from there
            try:
                self._require_own_origin(scope["path"], headers)
                state["holder"] = self._holder(scope["path"], headers)
                if not has_json_or_nothing(headers):
                    raise _not_json()
                with self.attempts.begun(headers.get(attempts.HEADER), request_id):
                    await self.app(scope, self._bounded(headers, in_time(receive_or_left, _too_slow())), send_with_id)
            except Refusal as refusal:
                await refusal.response(scope, receive, send_with_id)
            except attempts.TooManyDeaths:
                lost = Refusal(500, attempts.MESSAGE, attempts.CODE, headers=attempts.NOT_AGAIN)
                await lost.response(scope, receive, send_with_id)
            except asyncio.CancelledError:  # as Ray Serve says that the caller has left
                has_left = True
                raise
            finally:
                status = status or (HUNG_UP if has_left else 500)
                route = getattr(scope.get("route"), "path", "none")  # a path that leads nowhere is no label
                self.endpoint.metrics.request(route, status, perf_counter() - started)
                span.set_attributes({"http.route": route, "http.response.status_code": status, "id": request_id})
                if status >= 400:
                    fields = {"route_id": request_id, "status": status, "route": route}
                    log.warning("hung up" if status == HUNG_UP else "refused", extra=fields)

    def _require_own_origin(self, path: str, headers: Headers) -> None:
        """Keeps web pages away where no key does. Raises Refusal for a host that is not allowed, and a foreign page."""
        settings = self.endpoint.serving.settings if self.endpoint.serving is not None else None
        if settings is None or path in PROBES or not (settings.open or settings.allowed_hosts):
            return
        if not has_allowed_host(headers, settings.allowed_hosts):
            message = "the request's Host is no name of this machine's own, as localhost: allow it with --allowed-hosts"
            raise Refusal(403, message, "host_not_allowed")
        if settings.open and not _is_open_path(path) and not is_from_own_page(headers):
            message = "a page of another site sent the request: use keys for programs that run in browsers"
            raise Refusal(403, message, "origin_not_allowed")

    def _holder(self, path: str, headers: Headers) -> str:
        """Whose key it is. Every key is compared, each in constant time, so that the time tells nothing of them."""
        serving = self.endpoint.serving
        if serving is None or serving.settings.open or _is_open_path(path):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = f"sha256:{hashlib.sha256(key.strip().encode('utf-8', 'replace')).hexdigest()}"
        matches = [name for name, known in serving.settings.keys.items() if hmac.compare_digest(given, known)]
        if scheme.lower() != "bearer" or not matches:
            message = "no valid key: send the header Authorization: Bearer KEY"
            raise Refusal(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        return matches[0]

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Raises Refusal from `receive` once the body is longer than allowed, at once where its header says so."""
        limit = self.endpoint.serving.settings.limits.body_bytes if self.endpoint.serving else 0
        received = 0
        if limit > 0 and _states_more(headers.get("content-length", ""), limit):
            raise _too_large(limit)

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit > 0:
                raise _too_large(limit)
            return message

        return bounded


def _states_more(stated: str, limit: int) -> bool:
    """Is a Content-Length larger than `limit`? Python converts no number of more than 4,300 digits."""
    digits = stated.lstrip("0")
    return digits.isdecimal() and (len(digits) > len(str(limit)) or int(digits) > limit)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body must have at most {limit:,} bytes", "request_too_large")


def _too_slow() -> Refusal:
    message = f"the body was not there within {MOST_S:g} s"
    return Refusal(408, message, "request_timeout", headers={"connection": "close"})


def phrase(status: int) -> str:
    """A status in words, for what Starlette says of a path or a method."""
    return HTTPStatus(status).phrase.lower()


def _is_open_path(path: str) -> bool:
    return path == "/" or path.startswith(OPEN_PATHS)


def _not_json() -> Refusal:
    message = "the body must be JSON: send the header Content-Type: application/json"
    return Refusal(415, message, "unsupported_media_type")
