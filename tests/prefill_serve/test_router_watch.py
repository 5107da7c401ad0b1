"""A router that is published while the endpoint runs is taken over without a signal, and a bad one is refused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefill_router.router.artifact import Router
from prefill_serve.router_watch import RouterWatch
from prefill_serve.serving import Serving
from served import Api

PATIENCE_S = 120.0


@pytest.fixture
def published(api: Api, router: str, tmp_path: Path) -> Iterator[str]:
    """A copy of the router that `api` serves; `api` serves the original again afterwards."""
    shutil.copytree(router, tmp_path / "published")
    yield str(tmp_path / "published")
    api.configure(router=router)


def published_anew(uri: str, tolerance: float) -> str:
    """Publishes a changed router, and returns its version."""
    new = replace(Router.load(uri), default_tolerance=tolerance)
    new.save(uri)
    return new.version


def refresh(api: Api) -> Any:
    """Looks for a new router once, and returns the status."""
    assert api.client.portal is not None
    api.client.portal.call(api.endpoint.refresh)
    return api.client.get("/v1/status").raise_for_status().json()


@pytest.fixture
def num_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routers that were loaded."""
    loads, load = [], Serving.load

    def counted(settings: Any, *others: Any) -> Serving:
        loads.append(settings.router)
        return load(settings, *others)

    monkeypatch.setattr(Serving, "load", counted)
    return loads


def test_a_router_that_is_published_is_taken_over_once(api: Api, published: str, num_loads: list[str]) -> None:
    api.configure(router=published, tolerance=0.25)
    engine = api.endpoint.now.engine
    assert refresh(api)["router_version"] == Router.load(published).version
    assert num_loads == [published]
    version = published_anew(published, 0.5)
    assert [refresh(api)["router_version"] for _ in range(2)] == [version, version]
    assert num_loads == [published] * 2
    assert api.endpoint.now.engine is engine  # its encoder is not loaded again
    assert api.endpoint.now.settings.tolerance == 0.25


def test_a_router_that_does_not_load_is_refused_once_and_the_next_good_one_taken(
    api: Api, published: str, num_loads: list[str]
) -> None:
    api.configure(router=published)
    before = Router.load(published).version
    manifest = Path(published, "router.json")
    good = manifest.read_text()
    manifest.write_text(good.replace('"kernel_weight"', '"kernel_wait"'))
    for _ in range(2):
        status = refresh(api)
        assert "kernel_wait" in status["refused"]
        assert status["router_version"] == before
    assert num_loads == [published] * 2
    assert api.post({"prompt": "What is 17 * 23?"}).status_code == 200
    manifest.write_text(good)
    version = published_anew(published, 0.5)
    assert (refresh(api)["router_version"], refresh(api)["refused"]) == (version, None)


def test_canaries_and_shadows_are_looked_at_too(api: Api, router: str, published: str) -> None:
    api.configure(router=router, shadow=published)
    version = published_anew(published, 0.5)
    status = refresh(api)
    assert (status["router_version"], status["shadow_version"]) == (Router.load(router).version, version)


def test_a_replica_looks_as_often_as_its_settings_say(api: Api, published: str) -> None:
    api.configure(router=published, watch_s=0.01)
    assert api.client.portal is not None
    watch = RouterWatch(api.endpoint)
    api.client.portal.call(watch.restart)
    version = published_anew(published, 0.5)
    deadline = time.monotonic() + PATIENCE_S
    while (status := api.client.get("/v1/status").json())["router_version"] != version:
        assert time.monotonic() < deadline, status
    api.configure(router=published)
    api.client.portal.call(watch.restart)
    published_anew(published, 0.75)
    assert api.client.get("/v1/status").json()["router_version"] == version
