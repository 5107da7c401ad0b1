"""The HTTP API of an endpoint: paths, documents and errors. Any ASGI server can run it; it knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from prefill_router.common.errors import UserError
from prefill_serve.endpoint import Endpoint, NoTarget, NotReady, TooLong, UnknownTarget
from prefill_serve.gateway.proxy import NoUpstream, UnknownAnswer
from prefill_serve.gateway.routes import gateway_routes
from prefill_serve.gateway.state.call_ledger import CallLedger, LedgerAway, NoFeedback, OtherFeedback, UnknownRequest
from prefill_serve.middleware.gate import HUNG_UP, Refusal, RequestGate, phrase
from prefill_serve.playground import playground_routes
from prefill_serve.scheduler import Overloaded
from prefill_serve.wire import (
    BatchItem,
    BatchRequest,
    BatchResponse,
    ErrorDetail,
    ErrorResponse,
    Health,
    RouteRequest,
    RouteResponse,
    Status,
)

log = logging.getLogger("ray.serve")

_DESCRIPTION = "Which model should answer this prompt? The cheapest one that is good enough, before a token is written."
_RETRY = {"description": "Seconds to wait", "schema": {"type": "integer"}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is malformed"},
    401: {"model": ErrorResponse, "description": "No valid key"},
    403: {"model": ErrorResponse, "description": "Not for this caller, by this host, or for a page of another site"},
    404: {"model": ErrorResponse, "description": "A target is not in the pool"},
    408: {"model": ErrorResponse, "description": "The body did not come in time"},
    409: {"model": ErrorResponse, "description": "No target meets the constraints"},
    413: {"model": ErrorResponse, "description": "The body or the prompt is too long"},
    415: {"model": ErrorResponse, "description": "The body is not JSON by its content type"},
    429: {
        "model": ErrorResponse,
        "description": "Too busy, or a hard limit of a budget is reached",
        "headers": {"Retry-After": _RETRY},
    },
    500: {"model": ErrorResponse, "description": "The endpoint failed, or the request ended replicas"},
    502: {"model": ErrorResponse, "description": "No upstream answered"},
    504: {"model": ErrorResponse, "description": "No upstream answered in time"},
    503: {"model": ErrorResponse, "description": "Nothing serves yet", "headers": {"Retry-After": _RETRY}},
}
_OF_USERS: dict[type[UserError], tuple[int, str]] = {
    TooLong: (413, "prompt_too_long"),
    UnknownTarget: (404, "model_not_found"),
    NoTarget: (409, "no_target"),
    NoUpstream: (404, "no_upstream"),
    NoFeedback: (404, "no_feedback"),
    UnknownRequest: (404, "request_not_found"),
    OtherFeedback: (409, "other_feedback"),
    UnknownAnswer: (404, "response_not_found"),
}
_PROBE_ERRORS: dict[int | str, dict[str, Any]] = {503: _ERRORS[503]}


def create_api(endpoint: Endpoint, ledger: CallLedger, *, names_requests: bool = True) -> ASGIApp:
    """The API around an endpoint, behind its gate. The ledger is what the gateway remembers."""
    api = FastAPI(
        title="prefill-router",
        version=version("prefill-router"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(api)
    _add_documents(api)
    api.include_router(_routing_routes(endpoint))
    api.include_router(_state_routes(endpoint))
    api.include_router(gateway_routes(endpoint, ledger, _ERRORS))
    api.include_router(playground_routes(endpoint, _ERRORS))
    _describe(api)
    return RequestGate(api, endpoint, names_requests=names_requests)


def _routing_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(tags=["routing"], responses=_ERRORS)

    @routes.post("/v1/route", response_model=RouteResponse)
    async def route(request: RouteRequest, http: Request) -> Response:
        """The target for one prompt: the cheapest that is good enough, under the request's constraints.

        A body for OpenAI's chat completions or responses is taken as it is. Fields that have no say in routing, as
        `temperature`, are named in `metadata.ignored`; one that is nearly a field of these, as `tolerence`, gets 400.
        """
        return _json(await endpoint.route(request, http.state.request_id, http.state.holder))

    @routes.post("/v1/route/batch", response_model=BatchResponse)
    async def route_batch(batch: BatchRequest, http: Request) -> Response:
        """Many prompts at once; one that cannot be routed does not hold up the others."""
        limit = endpoint.now.settings.limits.batch
        if len(batch.requests) > limit:
            raise UserError(f"requests: there are {len(batch.requests):,}, must be at most {limit:,}")

        async def item(index: int, request: RouteRequest) -> BatchItem:
            try:
                request_id = f"{http.state.request_id}-{index}"
                return BatchItem(index=index, response=await endpoint.route(request, request_id, http.state.holder))
            except (UserError, Overloaded) as error:
                refusal = refusal_of(error)
                detail = ErrorDetail(**refusal.body["error"])
                return BatchItem(index=index, status=refusal.status_code, error=detail)

        return _json(
            BatchResponse(results=await asyncio.gather(*map(item, *zip(*enumerate(batch.requests), strict=True))))
        )

    return routes


def _state_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(tags=["state"], responses=_PROBE_ERRORS)

    @routes.get("/health", response_model=Health)
    async def health() -> Response:
        """200 as long as a router serves, also while new settings are refused."""
        if endpoint.serving is None:
            raise NotReady
        return _json(Health(status="ok"))

    @routes.get("/ready", response_model=Health)
    async def ready() -> Response:
        """200 once a real forward pass has run, 503 before."""
        return await health()

    @routes.get("/v1/status", response_model=Status, responses=_ERRORS)
    async def status(http: Request) -> Response:
        """What serves, and why the latest settings were refused; for administrators."""
        serving = endpoint.now
        if not serving.settings.is_admin(http.state.holder):
            raise Refusal(403, "only administrators see this: start the endpoint with --admins NAME", "not_admin")
        return _json(
            Status(
                router_version=serving.primary.version,
                encoder=serving.engine.encoder.name,
                targets=serving.primary.router.pool.target_names,
                canary_version=serving.canary.version if serving.canary else None,
                shadow_version=serving.shadow.version if serving.shadow else None,
                refused=endpoint.refused,
            )
        )

    return routes


def refusal_of(error: Exception) -> Refusal:
    """How an error is answered."""
    if isinstance(error, Overloaded):
        after = {"retry-after": str(math.ceil(error.retry_after_s))}
        return Refusal(429, str(error), "overloaded", headers=after)
    if isinstance(error, NotReady):
        return Refusal(
            503, "no router serves yet: try again in a few seconds", "not_ready", headers={"retry-after": "2"}
        )
    if isinstance(error, LedgerAway):
        message = "the ledger does not answer now: try again in a few seconds"
        return Refusal(503, message, "ledger_away", headers={"retry-after": "2"})
    if isinstance(error, ClientDisconnect):
        return Refusal(HUNG_UP, "the caller hung up", "hung_up")
    if isinstance(error, UserError):
        status, code = _OF_USERS.get(type(error), (400, "invalid_request"))
        return Refusal(status, str(error), code)
    log.exception("failed", exc_info=error)
    return Refusal(500, "the endpoint failed; its log says why, by the request's id", "internal_error")


def _add_errors(api: FastAPI) -> None:
    async def on_error(_request: Request, error: Exception) -> Response:
        return refusal_of(error).response

    async def on_invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part != "body")
        return Refusal(400, f"{key}: {problem['msg']}".removeprefix(": "), "invalid_request", key or None).response

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, Refusal):
            return error.response
        status = error.status_code
        message = f"{request.method} {request.url.path}: {phrase(status)}" if status in (404, 405) else error.detail
        return Refusal(status, message, phrase(status).replace(" ", "_"), headers=error.headers).response

    for kind in (UserError, Overloaded, NotReady, LedgerAway, ClientDisconnect, Exception):
        api.add_exception_handler(kind, on_error)
    api.add_exception_handler(RequestValidationError, on_invalid)
    api.add_exception_handler(HTTPException, on_http)


def _describe(api: FastAPI) -> None:
    """The OpenAPI document as it is answered: what is invalid gets 400, never 422, and a key is a bearer token."""
    document = api.openapi()
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}, {}]


def _add_documents(api: FastAPI) -> None:
    """/docs from the package's own files: no other host is asked for anything."""
    api.mount("/docs/static", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="static")

    @api.get("/docs", include_in_schema=False)
    async def documents() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="../openapi.json",
            title=api.title,
            swagger_js_url="docs/static/swagger-ui-bundle.js",
            swagger_css_url="docs/static/swagger-ui.css",
            swagger_favicon_url="docs/static/favicon.png",
        )
        page.headers["content-security-policy"] = "frame-ancestors 'none'"  # what it sends is its user's own click
        return page


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")
