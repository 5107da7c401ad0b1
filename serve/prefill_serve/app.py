"""The Ray Serve application. `prefill_serve.app:build_app` is what a Serve config file imports.

No `from __future__ import annotations` here: it would make Serve pass the builder a raw dict instead of `AppArgs`.
"""

import asyncio
import os

import numpy as np
import ray
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from ray import serve
from ray.serve import Application

from prefill_router import artifact
from prefill_router.config import StrictModel
from prefill_router.decision import Decision, Policy
from prefill_router.encoder import Tokens
from prefill_router.errors import UserError
from prefill_serve.http import Health, RouteRequest, RouteResponse, error_body

MAX_BATCH_SIZE = 32
BATCH_WAIT_S = 0.005


class AppArgs(StrictModel):
    """Arguments of the application, as in a Serve config file."""

    router: str = Field(min_length=1, description="Router artifact that `train` wrote")
    replicas: int = Field(1, ge=1, description="Copies of encoder and head")


def build_app(args: AppArgs) -> Application:
    """The endpoint of one router. Each replica takes a GPU where the cluster has any."""
    has_gpu = _num_gpus() >= args.replicas
    actor_options = {"num_cpus": 1, "num_gpus": 1 if has_gpu else 0}
    threads = max(1, (os.cpu_count() or 1) // args.replicas)
    deployment = RoutingEndpoint.options(  # type: ignore[attr-defined]
        num_replicas=args.replicas, ray_actor_options=actor_options
    )
    return deployment.bind(args.router, threads)  # type: ignore[no-any-return]


def _num_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0  # type: ignore[no-untyped-call]


api = FastAPI(
    title="prefill-router", description="Which model should answer this prompt?", docs_url=None, redoc_url=None
)


@api.exception_handler(UserError)
async def on_user_error(_request: Request, error: UserError) -> JSONResponse:
    return JSONResponse(error_body(str(error), "invalid_request"), status_code=400)


@api.exception_handler(RequestValidationError)
async def on_invalid_request(_request: Request, error: RequestValidationError) -> JSONResponse:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if part != "body")
    return JSONResponse(error_body(f"{key}: {problem['msg']}".removeprefix(": "), "invalid_request"), status_code=400)


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH_SIZE)
@serve.ingress(api)
class RoutingEndpoint:
    """Encoder and head in one replica. Requests are tokenised and checked alone, then prefilled in batches."""

    def __init__(self, router: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.router = artifact.load(router)
        # The first pass is slow: it is made here, so that a replica that is ready is also fast.
        self.router.decide(self.router.encoder.tokenize(["Hello."]), [Policy()])

    @api.post("/v1/route")
    async def route(self, request: RouteRequest) -> RouteResponse:
        """The target for one prompt: the cheapest that is good enough, under the request's constraints."""
        policy = request.to_policy()
        self.router.check_policy(policy)
        tokens = await asyncio.to_thread(self.router.encoder.tokenize, [request.to_prompt()])
        decision: Decision = await self.decide((tokens, policy))
        if decision.target is None:
            raise UserError("no target meets the constraints: raise max_cost_usd, lower min_p, or allow more targets")
        return RouteResponse(**vars(decision))

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def decide(self, requests: list[tuple[Tokens, Policy]]) -> list[Decision]:
        tokens = Tokens(
            ids=[ids for item, _ in requests for ids in item.ids],
            full_lengths=np.concatenate([item.full_lengths for item, _ in requests]),
        )
        return await asyncio.to_thread(self.router.decide, tokens, [policy for _, policy in requests])

    @api.get("/health")
    async def health(self) -> Health:
        return Health(
            status="ok",
            router_version=self.router.version,
            encoder=self.router.encoder.name,
            targets=self.router.pool.target_names,
        )
