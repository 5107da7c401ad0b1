"""The serve command: checks before start, and reloads while it runs."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from botocore.exceptions import EndpointConnectionError
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.exceptions import ActorDiedError, RayTaskError

from haproxies import Recorder
from ports import free_port
from prefill_router.common.errors import UserError
from prefill_router.router.artifact import Router
from prefill_serve.launcher import foreground
from prefill_serve.launcher.serve_options import KeyConfig, ServeConfig
from prefill_serve.serving import Serving
from prefill_serve.settings import AppArgs, Settings
from tokens import refusing_token

HASH = "sha256:" + "0" * 64


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[AppArgs]:
    """The applications passed to Ray Serve."""
    taken: list[AppArgs] = []
    monkeypatch.setattr(foreground, "build_app", lambda arguments: arguments)
    monkeypatch.setattr(foreground.ray_serve, "run", lambda arguments, **_: taken.append(arguments))
    return taken


def reload(started: ServeConfig, **changed: Any) -> AppArgs:
    return foreground.reload(lambda: started.model_copy(update=changed), foreground.app_arguments(started), started)


def test_what_only_a_restart_changes_is_said_of_each_key(
    router: str, tmp_path: Path, deployed: list[AppArgs], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.toml").write_text(f'ann = "{HASH}"')
    started = ServeConfig(router=router, keys=str(tmp_path / "keys.toml"))
    arguments = reload(started, host="0.0.0.0", port=8001, tolerance=0.5)
    assert capsys.readouterr().err.splitlines() == [
        "serve: host stays 127.0.0.1: restart to change it to 0.0.0.0",
        "serve: port stays 8000: restart to change it to 8001",
        f"serve: reloaded {router}",
    ]
    assert deployed == [arguments]
    assert arguments.tolerance == 0.5
    reload(started)
    assert capsys.readouterr().err.splitlines() == [f"serve: reloaded {router}"]


@pytest.mark.parametrize(
    "error", [UserError("bad"), OSError("bad"), EndpointConnectionError(endpoint_url="https://s3.example")]
)
def test_a_config_that_cannot_be_read_changes_nothing(
    router: str, deployed: list[AppArgs], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def read() -> ServeConfig:
        raise error

    started = ServeConfig(router=router)
    before = foreground.app_arguments(started)
    assert foreground.reload(read, before, started) is before
    assert capsys.readouterr().err == f"serve: reload refused, settings unchanged: {error}\n"
    assert deployed == []


def test_an_endpoint_that_others_reach_keeps_wanting_keys(
    router: str, tmp_path: Path, deployed: list[AppArgs], capsys: pytest.CaptureFixture[str]
) -> None:
    """The listening address never changes, even if the config's host does."""
    (tmp_path / "keys.toml").write_text(f'ann = "{HASH}"')
    started = ServeConfig(router=router, keys=str(tmp_path / "keys.toml"), host="0.0.0.0")
    assert reload(started, host="127.0.0.1", keys=None).keys == {"ann": HASH}
    said = capsys.readouterr().err
    assert "reload refused, settings unchanged" in said
    assert "took over" not in said
    assert deployed == []


@pytest.fixture
def failures(deployed: list[AppArgs], monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What Ray Serve raises of the next deployments, one each."""
    raised: list[Exception] = []

    def run(arguments: AppArgs, **_: object) -> None:
        deployed.append(arguments)
        if raised:
            raise raised.pop(0)

    monkeypatch.setattr(foreground.ray_serve, "run", run)
    return raised


def test_a_reload_that_fails_in_serve_restores_the_settings_before(
    router: str, deployed: list[AppArgs], failures: list[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    started = ServeConfig(router=router)
    before = foreground.app_arguments(started)
    failures.append(RuntimeError("Deploying application prefill-router failed:\nno replica started."))
    kept = reload(started, tolerance=0.5)
    assert capsys.readouterr().err == (
        "serve: reload failed, settings unchanged: Deploying application prefill-router failed: no replica started\n"
    )
    assert [arguments.tolerance for arguments in deployed] == [0.5, before.tolerance]
    assert deployed[-1] == kept == before.model_copy(update={"revision": 2})


def test_a_failed_reload_that_cannot_be_undone_is_said_and_the_endpoint_goes_on(
    router: str, deployed: list[AppArgs], failures: list[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    started = ServeConfig(router=router)
    failures.extend([ActorDiedError(), TimeoutError("no answer")])
    kept = reload(started, tolerance=0.5)
    said = capsys.readouterr().err
    assert said.startswith("serve: reload failed, and the settings before it were not restored (no answer), so reload")
    assert said.count("\n") == 1
    again = foreground.reload(lambda: started, kept, started)
    assert again.revision == 3
    assert deployed[-1] == again
    assert capsys.readouterr().err == f"serve: reloaded {router}\n"


def test_a_token_that_the_cluster_refuses_is_said_before_ray_tries(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_arguments, **_options: pytest.fail("Ray tries"))
    with refusing_token() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"{address}: the Ray cluster refuses this token.* set RAY_AUTH_MODE=token"):
            foreground.run(lambda: ServeConfig(router=router))


def test_a_port_in_use_is_said_before_ray_starts(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_arguments, **_options: pytest.fail("Ray was started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use: choose another with --port"):
            foreground.run(lambda: ServeConfig(router=router, port=port))


def test_a_ray_that_does_not_start_is_one_line(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception for it."""

    def too_slow(*_arguments: object, **_options: object) -> None:
        raise Exception("The current node timed out during startup.\nIt may be overloaded.")

    monkeypatch.setattr(ray, "init", too_slow)
    config = ServeConfig(router=router, port=free_port())
    with pytest.raises(UserError, match=r"^serve: Ray does not start: The current node timed out .*: try again$"):
        foreground.run(lambda: config)


def test_an_encoder_that_is_missing_is_said_before_a_replica_starts(router: str, tmp_path: Path) -> None:
    loaded = Router.load(router)
    identity = loaded.encoders[""]
    gone = identity.spec.model_copy(update={"model": str(tmp_path / "gone")})
    replace(loaded, encoders={"": identity.model_copy(update={"spec": gone})}).save(str(tmp_path / "router"))
    with pytest.raises(UserError, match=r"encoder .*gone: no such directory"):
        Serving.check(Settings.model_validate({"open": True, "router": str(tmp_path / "router")}))


def test_a_proxy_that_does_not_start_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster, the port may be in use on another machine."""

    def start(**_options: object) -> None:
        raise RayTaskError("ready", "Traceback ...", OSError("Failed to bind to address"))

    monkeypatch.setattr(ray_serve, "start", start)
    port = free_port()
    with pytest.raises(UserError, match=f"127.0.0.1:{port} failed to start: Failed to bind to address$"):
        foreground.start("127.0.0.1", port)


def test_a_proxy_that_was_slow_to_start_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve ends a proxy that is not ready in time, which may happen on a busy machine, and starts another."""
    results: list[Exception | None] = [ActorDiedError(), None]

    def start(**_options: object) -> None:
        if (error := results.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray_serve, "start", start)
    foreground.start("127.0.0.1", free_port())
    assert results == []


@pytest.mark.parametrize("error", [ActorDiedError(), TimeoutError("HTTP proxies not available after 60s.")])
def test_proxies_that_never_start_are_a_users_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_options: object) -> None:
        raise error

    monkeypatch.setattr(ray_serve, "start", start)
    with pytest.raises(UserError, match="failed to start: "):
        foreground.start("127.0.0.1", free_port())


@pytest.mark.parametrize("name", ["Zoë", "a b", "a.b", ""])
def test_a_callers_name_is_a_key_of_toml(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        KeyConfig(name=name, keys="keys.toml")


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Recorder()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(foreground, "_READY_TIMEOUT_S", 10.0)
    foreground._wait_until_ready(ServeConfig(router="r", port=endpoint.port))
    assert len(endpoint.got) == 1
    endpoint.close()


@pytest.mark.parametrize(
    ("host", "url", "is_open_to_others"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", False),
        ("localhost", "http://localhost:8000", False),
        ("10.0.0.7", "http://10.0.0.7:8000", False),
        ("0.0.0.0", "http://127.0.0.1:8000", True),
        ("::", "http://[::1]:8000", True),
    ],
)
def test_the_address_that_is_said_opens_in_a_browser_of_this_machine(
    host: str, url: str, is_open_to_others: bool
) -> None:
    said = foreground._invitation(ServeConfig(router="r", host=host))
    assert said.startswith(f"serve: POST {url}/v1/route, or open {url}/ in a browser")
    assert said.endswith("; it listens on all interfaces of this machine") == is_open_to_others


def test_a_key_that_is_not_set_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls would fail one by one, with the upstream's 401."""
    upstream = 'upstream = { base_url = "https://models.example/v1", key_env = "%s_API_KEY" }'
    target = '[[pool]]\nname = "%s"\ninput_price = 1.0\noutput_price = 1.0\n'
    text = "".join(target % name + upstream % name.upper() + "\n" for name in ("big", "small"))
    (tmp_path / "pool.toml").write_text(text)
    monkeypatch.setenv("BIG_API_KEY", "k")
    monkeypatch.delenv("SMALL_API_KEY", raising=False)
    foreground.warn_of_unset_keys(ServeConfig(router="r", pool=str(tmp_path / "pool.toml")))
    assert capsys.readouterr().err == (
        'serve: target "small": SMALL_API_KEY is not set: its upstream will refuse calls\n'
    )
