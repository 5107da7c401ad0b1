"""The commands `prefill-router serve` and `prefill-router key`."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import typer

from prefill_router import storage
from prefill_router.common.addresses import ray_address
from prefill_router.common.console import live
from prefill_router.common.errors import UserError
from prefill_serve.launcher.haproxy import environment, own_folder
from prefill_serve.launcher.launch_arguments import checked_arguments
from prefill_serve.launcher.serve_options import KeyConfig, ServeConfig


def serve(read: Callable[[], ServeConfig]) -> None:
    """Serves on the cluster in RAY_ADDRESS, or on a local Ray that listens on loopback only.

    `read` returns the current config; it is called again on SIGHUP. Raises UserError if the router cannot be loaded,
    or if an endpoint without keys would be reachable from other machines.
    """
    checked_arguments(read())  # errors that can be told before Ray and torch are imported, which takes long
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with ExitStack() as stack:
        if ray_address() is None:
            # Ray listens on loopback, except for the replicas' ports to each other, which require the token.
            ours["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            ours |= environment(stack.enter_context(own_folder()).path)
        stack.enter_context(_set(ours))
        with live("serve: starting"):
            from prefill_serve.launcher.foreground import run  # Ray reads the environment on import

        run(read)


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables that are unset, until the block ends."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def make_key(read: Callable[[], KeyConfig]) -> None:
    """Prints a new key and adds its hash to the file. Raises UserError if the name has a key there."""
    config = read()
    text = storage.read_bytes(config.keys).decode() if storage.exists(config.keys) else ""
    if text and config.name in storage.read_toml(config.keys):
        raise UserError(
            f"{config.keys}: {config.name} already has a key: remove its line first, or choose another name"
        )
    key = f"pr-{secrets.token_urlsafe(32)}"
    line = f'{config.name} = "sha256:{hashlib.sha256(key.encode()).hexdigest()}"\n'
    storage.write_bytes(config.keys, f"{text.rstrip()}\n{line}".lstrip().encode())
    typer.echo(key)
