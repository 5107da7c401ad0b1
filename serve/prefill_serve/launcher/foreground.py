"""Runs an endpoint in the foreground: starts it, reloads it on SIGHUP, stops it on SIGINT or SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable

import httpx
import ray
from botocore.exceptions import BotoCoreError
from ray import serve as ray_serve
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import ActorDiedError, AuthenticationError, RayError, RpcError

from prefill_router.common.addresses import ray_address, require_listener, token_refused
from prefill_router.common.console import doing, live, say, silent_stderr
from prefill_router.common.errors import UserError, one_line
from prefill_serve.app import build_app
from prefill_serve.launcher.launch_arguments import app_arguments, checked_arguments, warn_of_unset_keys
from prefill_serve.launcher.serve_options import ServeConfig
from prefill_serve.serving import Serving
from prefill_serve.settings import AppArgs

_APP = "prefill-router"
_READY_TIMEOUT_S = 300.0
_LISTENS = ("host", "port")  # fixed when Ray Serve starts
_ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # by what this machine reaches


def run(read: Callable[[], ServeConfig]) -> None:
    """Serves until interrupted or terminated; see `command.serve`."""
    config = read()
    arguments = checked_arguments(config)
    cluster = ray_address()
    if not cluster:
        warn_of_unset_keys(config)
    with live("serve: checking the router"):
        Serving.check(arguments.settings)  # here a bad artifact is one error line, in a replica a crash loop
        if cluster and ":" in cluster and "://" not in cluster:
            _require_token(cluster)
    with live("serve: starting Ray"), silent_stderr():
        try:
            ray.init(cluster or "local", logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # a bare one if a node is not up within 30 s
            raise UserError(f"serve: Ray does not start: {one_line(error)}: try again") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # ray.init installs its own SIGTERM handler.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hangup = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: hangup.set())
    try:
        with live("serve: starting the proxies"):
            start(config.host, config.port)
        with live("serve: waiting for a replica, which loads the router and its encoder"):
            _deploy(arguments)
            _wait_until_ready(config)
        say(_invitation(config))
        while hangup.wait():
            hangup.clear()
            with live("serve: reloading"):
                arguments = reload(read, arguments, config)
    except KeyboardInterrupt:
        pass
    finally:
        with live("serve: stopping"):
            if cluster:
                ray_serve.delete(_APP)
            with silent_stderr():
                ray.shutdown()


def _require_token(address: str) -> None:
    """Raises UserError if the cluster is unreachable or refuses the token, faster than `ray.init` does."""
    require_listener(address, "RAY_ADDRESS")
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        with doing(f"serve: waiting for an answer from {address}"), silent_stderr():
            GcsClient(address=address)
    except AuthenticationError:
        raise token_refused(address) from None
    except RpcError as error:
        raise UserError(f"RAY_ADDRESS = {address}: no Ray cluster answers ({error})") from None


def start(host: str, port: int) -> None:
    """Starts Ray Serve's proxies. Raises UserError if one fails to start, for example on a port in use."""
    listens = {"host": host, "port": port}
    try:
        try:
            ray_serve.start(http_options=listens)
        except ActorDiedError:  # Serve ended a proxy that was slow to start, and starts another with more time
            ray_serve.start(http_options=listens)
    except (RayError, TimeoutError) as error:
        cause = getattr(error, "cause", error)
        raise UserError(f"serve: the proxy at {host}:{port} failed to start: {cause}") from None


def _deploy(arguments: AppArgs) -> None:
    ray_serve.run(build_app(arguments), name=_APP, route_prefix="/")


def _url(config: ServeConfig) -> str:
    """The endpoint's address for programs of this machine."""
    host = _ALL_INTERFACES.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _invitation(config: ServeConfig) -> str:
    """Says how to reach the endpoint."""
    url = _url(config)
    others = "; it listens on all interfaces of this machine" if config.host in _ALL_INTERFACES else ""
    return f"serve: POST {url}/v1/route, or open {url}/ in a browser{others}"


def _wait_until_ready(config: ServeConfig) -> None:
    """Waits until a replica is ready. With --to-zero this first request starts one."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            ready = httpx.get(f"{_url(config)}/ready", timeout=_READY_TIMEOUT_S, trust_env=False)
            if ready.status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise UserError(f"serve: no replica was ready within {_READY_TIMEOUT_S:.0f} s: see Ray's logs")


def reload(read: Callable[[], ServeConfig], current: AppArgs, started: ServeConfig) -> AppArgs:
    """Applies the current config and files; on any error reports it and keeps the `current` arguments.

    `started` is the config at start-up: the listening address never changes, and decides whether keys are required.
    """
    stays = {name: getattr(started, name) for name in _LISTENS}
    try:
        config = read()
        arguments = app_arguments(config.model_copy(update=stays), current.revision + 1)
        Serving.check(arguments.settings)
    except (UserError, OSError, BotoCoreError) as error:
        say(f"serve: reload refused, settings unchanged: {error}")
        return current
    try:
        _deploy(arguments)
    except Exception as error:  # Serve raises exceptions of many kinds
        return _restored(current, arguments.revision + 1, error)
    for name, value in stays.items():
        if (other := getattr(config, name)) != value:
            say(f"serve: {name} stays {value}: restart to change it to {other}")
    say(f"serve: reloaded {arguments.router}")
    return arguments


def _restored(before: AppArgs, revision: int, failure: Exception) -> AppArgs:
    """Reports a failed reload, and applies the arguments `before` it again, since replicas may have taken new ones."""
    before = before.model_copy(update={"revision": revision})  # Serve passes on only what has changed
    try:
        _deploy(before)
        state = "settings unchanged"
    except Exception as error:
        state = f"and the settings before it were not restored ({one_line(error)}), so reload again or restart"
    say(f"serve: reload failed, {state}: {one_line(failure)}")
    return before
