"""The Ray Serve application. A Serve config file names it as `import_path: prefill_serve.app:build_app`.

No `from __future__ import annotations` here: it would make Serve pass the builder a raw dict instead of `AppArgs`.
"""

import asyncio
import hashlib
import os
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from prefill_router.common.errors import UserError
from prefill_router.common.validation import validate
from prefill_serve.api import create_api
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.state.call_ledger import LocalLedger
from prefill_serve.gateway.state.shared import RemoteLedger, SharedLedger
from prefill_serve.router_watch import RouterWatch
from prefill_serve.scaling import WORK_S, ByWork
from prefill_serve.settings import AppArgs, Autoscaling, Settings
from prefill_serve.traces import export_traces

DEPLOYMENT = "Endpoint"
CHECK_TIMEOUT_S = 10.0


def build_app(args: AppArgs) -> Application:
    """Builds the Serve application. On a cluster that adds GPU nodes on demand, set `gpus`."""
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.most_replicas)
    gpus = args.gpus if args.gpus is not None else float(_num_gpus() >= args.most_replicas)
    settings = args.settings.model_dump()
    fixed = args.model_dump_json(include=set(AppArgs.model_fields) - set(Settings.model_fields))
    scale: dict[str, Any] = {"num_replicas": args.replicas}
    if args.autoscaling is not None:
        scale = {"autoscaling_config": _autoscaling_config(args.autoscaling)}
    deployment = Replica.options(  # type: ignore[attr-defined]
        **scale,
        user_config=settings,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    # Without an explicit version, serve.run treats every deployment as new code and restarts replicas for new settings.
    deployment._version = hashlib.sha256(f"{fixed}{args.gateway is None}".encode()).hexdigest()[:16]
    if args.gateway is None:
        return deployment.bind(threads, args.traces, settings)  # type: ignore[no-any-return]
    ledger = SharedLedger.options(user_config=args.gateway.ledger.model_dump())  # type: ignore[attr-defined]
    ledger._version = "1"
    return deployment.bind(threads, args.traces, settings, ledger.bind())  # type: ignore[no-any-return]


def _autoscaling_config(autoscaling: Autoscaling) -> AutoscalingConfig:
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function=ByWork, policy_kwargs={"target_work_s": autoscaling.target_work_s}
    )
    return AutoscalingConfig(**autoscaling.model_dump(exclude={"target_work_s"}), policy=policy)


def _num_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0  # type: ignore[no-untyped-call]


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=1024,  # the scheduler's wait limit applies first
    max_queued_requests=1024,
    health_check_period_s=5.0,
    health_check_timeout_s=2 * CHECK_TIMEOUT_S,
    graceful_shutdown_timeout_s=30.0,
    logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
)
@serve.ingress()
class Replica:
    """One replica: encoder and router heads in one process, behind the HTTP API."""

    def __init__(
        self, threads: int, traces: str | None, first: dict[str, Any], ledger: DeploymentHandle[Any] | None = None
    ) -> None:
        torch.set_num_threads(1)  # the engine's threads set their own number
        if traces is not None:
            export_traces(traces)
        self.endpoint = Endpoint(threads)
        self.watch = RouterWatch(self.endpoint)
        self.first = first
        self.ledger = LocalLedger() if ledger is None else RemoteLedger(ledger)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Applies new settings. Invalid ones are refused: the current settings, or else the first ones, stay in use."""
        try:
            await self.endpoint.configure(self._validated(user_config))
        except Exception:
            if self.endpoint.serving is None:
                if user_config == self.first:
                    raise
                refused = self.endpoint.refused
                await self.endpoint.configure(validate(Settings, self.first, "settings"))
                self.endpoint.refused = refused
        self.watch.restart()

    def _validated(self, user_config: dict[str, Any]) -> Settings:
        """Raises UserError for invalid settings, after making the reason known."""
        try:
            return validate(Settings, user_config, "user_config")
        except UserError as error:
            self.endpoint.refuse(str(error))
            raise

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Queued work of this replica, which Serve passes to `ByWork`."""
        serving = self.endpoint.serving
        return {WORK_S: serving.engine.scheduler.work_s if serving is not None else 0.0}

    async def check_health(self) -> None:
        """Reads a test prompt; Serve replaces a replica whose check fails or times out."""
        await asyncio.wait_for(self.endpoint.check(), CHECK_TIMEOUT_S)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_api(self.endpoint, self.ledger, names_requests=False)  # Serve adds the header
