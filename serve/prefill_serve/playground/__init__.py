"""The playground: a single page at `/` (three static files) that talks to this endpoint only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from prefill_router.metrics import ENOUGH_VALIDATION
from prefill_router.router.artifact import Router
from prefill_serve.endpoint import Endpoint
from prefill_serve.playground.served_router import CurvePoint, RouterCard, ServedTarget, SinglePoint

FOLDER = Path(__file__).parent
PATHS = ("/", "/playground.css", "/playground.js")
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def playground_routes(endpoint: Endpoint, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """Returns the routes of the page and of its data; `errors` documents their error responses."""
    routes = APIRouter()

    def add_file(path: str, name: str) -> None:
        @routes.get(path, include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(FOLDER / name, headers=_HEADERS)

    for path, name in zip(PATHS, ("index.html", "playground.css", "playground.js"), strict=True):
        add_file(path, name)

    @routes.get("/v1/router", responses=errors, tags=["state"])
    async def router_card() -> RouterCard:
        """The loaded router: its targets and its cost-accuracy curve."""
        return card_of(endpoint)

    return routes


def card_of(endpoint: Endpoint) -> RouterCard:
    serving = endpoint.now
    head, has_gateway = serving.primary, serving.settings.gateway is not None
    router = head.router
    training = router.training if isinstance(router, Router) else {}
    validation = training.get("validation", {})
    singles = validation.get("singles", {})
    return RouterCard(
        router_version=head.version,
        encoder=serving.engine.encoder_names,
        missing_encoders=list(serving.engine.sensors.missing),
        tolerance=head.tolerance,
        targets=[
            ServedTarget(
                name=target.name,
                input_price=target.input_price,
                output_price=target.output_price,
                price_source=router.pool.price_sources.get(target.name),
                can_answer=has_gateway and target.upstream is not None,
            )
            for target in router.pool.targets
        ],
        curve=[
            CurvePoint(tolerance=tolerance, cost_usd=cost_usd, accuracy=accuracy)
            for tolerance, cost_usd, accuracy in validation.get("curve", [])
        ],
        singles=[
            SinglePoint(target=target, cost_usd=cost_usd, accuracy=accuracy)
            for target, (cost_usd, accuracy) in singles.items()
        ],
        num_validation=training.get("num_validation"),
        enough_validation=ENOUGH_VALIDATION,
    )
