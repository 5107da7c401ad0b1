"""The endpoint's HTTP API: paths, OpenAPI document and errors. Runs on any ASGI server and does not import Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from prefill_router.common.errors import UserError
from prefill_serve.endpoint import Endpoint, NoTarget, NotReady, TooLong, UnknownTarget
from prefill_serve.gateway.planner import NoUpstream, UnknownAnswer
from prefill_serve.gateway.routes import CALL_PATHS, gateway_routes, unless_disconnected
from prefill_serve.gateway.state.call_ledger import CallLedger, LedgerUnavailable
from prefill_serve.gateway.state.feedback import ConflictingFeedback, FeedbackDisabled, UnknownRequest
from prefill_serve.middleware.direct_paths import DirectPaths
from prefill_serve.middleware.gate import HUNG_UP, Refusal, RequestGate, phrase
from prefill_serve.playground import playground_routes
from prefill_serve.scheduler import Overloaded
from prefill_serve.wire import (
    REQUEST_ID,
    BatchItem,
    BatchRequest,
    BatchResponse,
    ErrorDetail,
    ErrorResponse,
    Health,
    RouteRequest,
    RouteResponse,
    Status,
    in_plain_words,
)

log = logging.getLogger("ray.serve")

_DESCRIPTION = "Chooses the cheapest model that is good enough for a prompt, before any answer is generated."
_ROUTE = "/v1/route"
_RETRY = {"description": "Seconds to wait before the next try", "schema": {"type": "integer"}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is malformed"},
    401: {"model": ErrorResponse, "description": "The bearer key is missing or invalid"},
    403: {"model": ErrorResponse, "description": "Forbidden for this caller, Host header, or web page"},
    404: {"model": ErrorResponse, "description": "Unknown target, request or response"},
    408: {"model": ErrorResponse, "description": "The body took too long to arrive"},
    409: {"model": ErrorResponse, "description": "No target meets the constraints"},
    413: {"model": ErrorResponse, "description": "The body or the prompt is too long"},
    415: {"model": ErrorResponse, "description": "The content type is not JSON"},
    429: {
        "model": ErrorResponse,
        "description": "The queue is full, or a hard budget limit is reached",
        "headers": {"Retry-After": _RETRY},
    },
    500: {"model": ErrorResponse, "description": "Internal error, or the request crashed two replicas"},
    502: {"model": ErrorResponse, "description": "No upstream gave a usable answer"},
    504: {"model": ErrorResponse, "description": "No upstream answered in time"},
    503: {
        "model": ErrorResponse,
        "description": "Not ready; the message says what the endpoint waits for",
        "headers": {"Retry-After": _RETRY},
    },
}
_OF_USERS: dict[type[UserError], tuple[int, str]] = {
    TooLong: (413, "prompt_too_long"),
    UnknownTarget: (404, "model_not_found"),
    NoTarget: (409, "no_target"),
    NoUpstream: (404, "no_upstream"),
    FeedbackDisabled: (404, "no_feedback"),
    UnknownRequest: (404, "request_not_found"),
    ConflictingFeedback: (409, "other_feedback"),
    UnknownAnswer: (404, "response_not_found"),
}
# Swagger's colours have too little contrast and no dark scheme, and some of its fields have no name.
_LEGIBLE = """<style>
  html { background: white }
  @media (prefers-color-scheme: dark) { html { filter: invert(.92) hue-rotate(180deg) } }
  .swagger-ui .info .title small { background: #4b5563 }
  .swagger-ui .info .title small.version-stamp { background: #3f6212 }
  .swagger-ui .opblock.opblock-get .opblock-summary-method { background: #1d5fa8 }
  .swagger-ui .opblock.opblock-post .opblock-summary-method { background: #14704a }
  .swagger-ui .btn.authorize { color: #14704a; border-color: #14704a }
  .swagger-ui .microlight { max-height: none !important; overflow: visible !important; white-space: pre-wrap }
  .swagger-ui .btn.execute { background: #1d5fa8 }
  .swagger-ui .btn.cancel, .swagger-ui .parameter__name.required::after { color: #b91c1c }
  .swagger-ui .info .base-url, .swagger-ui a.nostyle, .swagger-ui .opblock .opblock-summary-description,
  .swagger-ui .model-toggle, .swagger-ui .json-schema-2020-12__title, .swagger-ui .info a,
  .swagger-ui .json-schema-2020-12-expand-deep-button, .swagger-ui .parameter__in { color: #1f2937 }
</style>
<script>
  new MutationObserver(() => {
    for (const field of document.querySelectorAll(":is(textarea, select):not([aria-label])"))
      field.ariaLabel = field.localName === "textarea" ? "Request body" : "Media type";
  }).observe(document, { childList: true, subtree: true });
</script>
"""
_PROBE_ERRORS: dict[int | str, dict[str, Any]] = {503: _ERRORS[503]}


def create_api(endpoint: Endpoint, ledger: CallLedger, *, names_requests: bool = True) -> ASGIApp:
    """Returns the ASGI app of an endpoint, wrapped in `RequestGate`; the gateway's calls are recorded in `ledger`."""
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
    gateway = gateway_routes(endpoint, ledger, _ERRORS)
    api.include_router(gateway)
    api.include_router(playground_routes(endpoint, _ERRORS))
    _describe(api)
    answers = {r.path: r.endpoint for r in gateway.routes if isinstance(r, APIRoute) and r.path in CALL_PATHS}
    answers[_ROUTE] = partial(_route, endpoint)
    return RequestGate(DirectPaths(api, answers, error_response), endpoint, names_requests=names_requests)


async def _route(endpoint: Endpoint, http: Request) -> Response | None:
    """The answer to a valid request for a route; FastAPI says what is wrong with any other."""
    if "content-type" not in http.headers:
        return None
    try:
        request = RouteRequest.model_validate(json.loads(await http.body()))
    except (ValueError, RecursionError):
        return None
    return await unless_disconnected(http, _routed(endpoint, request, http))


async def _routed(endpoint: Endpoint, request: RouteRequest, http: Request) -> Response:
    return _json(await endpoint.route(request, http.state.request_id, http.state.caller))


def _routing_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(tags=["routing"], responses=_ERRORS)

    @routes.post(_ROUTE, response_model=RouteResponse, openapi_extra={"parameters": [REQUEST_ID]})
    async def route(request: RouteRequest, http: Request) -> Response:
        """Choose the target for one prompt: the cheapest one that is good enough under the request's constraints.

        Accepts the whole body of OpenAI's, Anthropic's, Google's and Amazon's APIs, if its `model` is `auto`. Fields
        that do not affect routing, such as `temperature`, are listed in `metadata.ignored`. A probable misspelling,
        such as `tolerence`, gets 400.
        """
        return await _routed(endpoint, request, http)

    @routes.post("/v1/route/batch", response_model=BatchResponse)
    async def route_batch(batch: BatchRequest, http: Request) -> Response:
        """Route many prompts at once. Each prompt gets its own result or error."""
        limit = endpoint.now.settings.limits.batch
        if len(batch.requests) > limit:
            raise UserError(f"requests: has {len(batch.requests):,} items, must have at most {limit:,}")

        async def item(index: int, request: RouteRequest) -> BatchItem:
            try:
                request_id = f"{http.state.request_id}-{index}"
                return BatchItem(index=index, response=await endpoint.route(request, request_id, http.state.caller))
            except (UserError, Overloaded) as error:
                refusal = refusal_of(error)
                detail = ErrorDetail(**refusal.body["error"])
                return BatchItem(index=index, status=refusal.status_code, error=detail)

        async def answer() -> Response:
            results = await asyncio.gather(*map(item, *zip(*enumerate(batch.requests), strict=True)))
            return _json(BatchResponse(results=results))

        return await unless_disconnected(http, answer())

    return routes


def _state_routes(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(tags=["state"], responses=_PROBE_ERRORS)

    @routes.get("/health", response_model=Health)
    async def health() -> Response:
        """200 while a router is loaded, even if newer settings were refused."""
        _ = endpoint.now
        return _json(Health(status="ok"))

    @routes.get("/ready", response_model=Health)
    async def ready() -> Response:
        """200 after the first real forward pass; before, 503 and what the endpoint waits for."""
        return await health()

    @routes.get("/v1/status", response_model=Status, responses=_ERRORS)
    async def status(http: Request) -> Response:
        """Loaded routers, and why the latest settings were refused. For administrators only."""
        serving = endpoint.now
        if not serving.settings.is_admin(http.state.caller):
            raise Refusal(403, "only administrators may read this: start the endpoint with --admins NAME", "not_admin")
        return _json(
            Status(
                router_version=serving.primary.version,
                encoder=serving.engine.encoder_names,
                missing_encoders=serving.engine.sensors.reasons,
                targets=serving.primary.router.pool.target_names,
                canary_version=serving.canary.version if serving.canary else None,
                shadow_version=serving.shadow.version if serving.shadow else None,
                refused=endpoint.refused,
            )
        )

    return routes


def refusal_of(error: Exception) -> Refusal:
    """The HTTP response for an exception."""
    if isinstance(error, Overloaded):
        after = {"retry-after": str(math.ceil(error.retry_after_s))}
        return Refusal(429, str(error), "overloaded", headers=after)
    if isinstance(error, NotReady):
        message = f"not ready: {error}: try again in a few seconds"
        return Refusal(503, message, "not_ready", headers={"retry-after": "2"})
    if isinstance(error, LedgerUnavailable):
        message = "the ledger is unavailable: try again in a few seconds"
        return Refusal(503, message, "ledger_away", headers={"retry-after": "2"})
    if isinstance(error, ClientDisconnect):
        return Refusal(HUNG_UP, "the caller closed the connection", "hung_up")
    if isinstance(error, UserError):
        status, code = _OF_USERS.get(type(error), (400, "invalid_request"))
        return Refusal(status, str(error), code)
    log.exception("request failed", exc_info=error)
    return Refusal(500, "internal error: see the endpoint's log for this request id", "internal_error")


def error_response(request: Request, error: Exception) -> Response:
    """The response to a request that raised an exception."""
    path = request.url.path
    if isinstance(error, Refusal):
        return error.response_at(path)
    if isinstance(error, HTTPException):
        status = error.status_code
        message = f"{request.method} {path}: {phrase(status)}" if status in (404, 405) else error.detail
        return Refusal(status, message, phrase(status).replace(" ", "_"), headers=error.headers).response_at(path)
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part != "body")
        if problem["type"] == "json_invalid":
            reason, position = problem["ctx"]["error"], int(key) + 1
            message = f"the body is not valid JSON: {reason} at character {position:,}"
            return Refusal(400, message, "invalid_request").response_at(path)
        message = f"{key}: {in_plain_words(problem)}" if key else f"the body: {in_plain_words(problem)}"
        return Refusal(400, message, "invalid_request", key or None).response_at(path)
    return refusal_of(error).response_at(path)


def _add_errors(api: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    for kind in (
        UserError,
        Overloaded,
        NotReady,
        LedgerUnavailable,
        ClientDisconnect,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        api.add_exception_handler(kind, on_error)


def _describe(api: FastAPI) -> None:
    """Corrects the generated OpenAPI document.

    Invalid requests get 400, not 422, a key is a bearer token, and every body has an example, which /docs sends.
    """
    document = api.openapi()
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if reference := content.get("schema", {}).get("$ref"):
                content["example"] = schemas[reference.rpartition("/")[2]]["examples"][0]
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}, {}]


def _add_documents(api: FastAPI) -> None:
    """Serves /docs from the fastapi_offline package, so that browsers load nothing from other hosts."""
    api.mount("/docs/static", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="static")

    @api.get("/docs", include_in_schema=False)
    async def documents() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="../openapi.json",
            title=api.title,
            swagger_js_url="docs/static/swagger-ui-bundle.js",
            swagger_css_url="docs/static/swagger-ui.css",
            swagger_favicon_url="docs/static/favicon.png",
            # With deep links, each button has a link inside, which screen readers cannot reach.
            swagger_ui_parameters={"deepLinking": False, "defaultModelsExpandDepth": 0},
        )
        html = bytes(page.body).decode().replace("<html>", '<html lang="en">').replace("</head>", f"{_LEGIBLE}</head>")
        # The page sends real requests.
        return HTMLResponse(html, headers={"content-security-policy": "frame-ancestors 'none'"})


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")
