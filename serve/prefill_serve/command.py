"""`prefill-router serve`: the endpoint on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import signal
import threading

import ray
from ray import serve as ray_serve

from prefill_router.config import ServeConfig
from prefill_router.console import say, silent_stderr
from prefill_router.router import Router
from prefill_serve.app import AppArgs, build_app

_APP = "prefill-router"


def serve(config: ServeConfig) -> None:
    """Serves until interrupted or terminated. Raises UserError where there is no router to serve."""
    Router.load(config.router)  # a bad artifact is one clear line here, and a crash loop in a replica
    cluster = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with silent_stderr():
        ray.init(cluster, logging_level=logging.ERROR, log_to_driver=False)
    # Ray has its own idea of SIGTERM, which it sets in init.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray_serve.start(http_options={"host": config.host, "port": config.port})
        ray_serve.run(build_app(AppArgs(router=config.router, replicas=config.replicas)), name=_APP, route_prefix="/")
        say(f"serve: POST http://{config.host}:{config.port}/v1/route")
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        if cluster:
            ray_serve.delete(_APP)
        with silent_stderr():
            ray.shutdown()
