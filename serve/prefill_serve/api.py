"""The endpoint's HTTP API: its paths. Runs on any ASGI server and does not import Ray."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import ASGIApp

from prefill_router.common.errors import UserError
from prefill_serve.api_docs import add_docs_page, correct_document
from prefill_serve.endpoint import Endpoint
from prefill_serve.error_responses import ERRORS, add_error_handlers, error_response, refusal_of
from prefill_serve.gateway.routes import CALL_PATHS, gateway_routes, unless_disconnected
from prefill_serve.gateway.state.call_ledger import CallLedger
from prefill_serve.http_errors import ErrorDetail, Refusal
from prefill_serve.middleware.direct_paths import DirectPaths
from prefill_serve.middleware.gate import RequestGate
from prefill_serve.playground import playground_routes
from prefill_serve.scheduler import Overloaded
from prefill_serve.wire import (
    REQUEST_ID,
    BatchItem,
    BatchRequest,
    BatchResponse,
    Health,
    RouteRequest,
    RouteResponse,
    Status,
)

_DESCRIPTION = "Chooses the cheapest model that is good enough for a prompt, before any answer is generated."
_ROUTE = "/v1/route"
_PROBE_ERRORS: dict[int | str, dict[str, Any]] = {503: ERRORS[503]}


def create_api(endpoint: Endpoint, ledger: CallLedger, *, names_requests: bool = True) -> ASGIApp:
    """Returns the ASGI app of an endpoint, wrapped in `RequestGate`; the gateway's calls are recorded in `ledger`."""
    api = FastAPI(
        title="prefill-router",
        version=version("prefill-router"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    add_error_handlers(api)
    add_docs_page(api)
    api.include_router(_routing_routes(endpoint))
    api.include_router(_state_routes(endpoint))
    gateway = gateway_routes(endpoint, ledger, ERRORS)
    api.include_router(gateway)
    api.include_router(playground_routes(endpoint, ERRORS))
    correct_document(api)
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
    routes = APIRouter(tags=["routing"], responses=ERRORS)

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

    @routes.get("/v1/status", response_model=Status, responses=ERRORS)
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


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")
