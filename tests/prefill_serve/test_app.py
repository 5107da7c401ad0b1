"""Resources that the application requests from the cluster."""

from __future__ import annotations

import asyncio

import pytest

from prefill_serve.app import Replica, build_app
from prefill_serve.settings import AppArgs


@pytest.mark.parametrize(("gpus", "asked"), [(None, 0.0), (0.5, 0.5), (1, 1.0)])
def test_a_replica_waits_for_the_gpus_that_it_is_told_of(gpus: float | None, asked: float) -> None:
    """Even if the cluster has none now: it may add a node."""
    app = build_app(AppArgs(router="s3://bucket/router", open=True, gpus=gpus))
    assert app._bound_deployment.ray_actor_options["num_gpus"] == asked


def test_settings_that_are_refused_are_known_with_their_reason(router: str) -> None:
    settings = {"router": router, "open": True}
    replica = Replica.func_or_class.__mro__[1](1, None, settings)  # without what Serve adds

    async def scenario() -> None:
        await replica.reconfigure(settings)
        await replica.reconfigure({**settings, "tolerence": 0.1})

    asyncio.run(scenario())
    assert "tolerence" in replica.endpoint.refused
    assert replica.endpoint.serving is not None
