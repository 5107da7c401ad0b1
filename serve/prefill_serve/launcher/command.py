"""The commands of this package: `prefill-router serve` and `prefill-router key`."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import typer

from prefill_router import storage
from prefill_router.common.addresses import ray_address
from prefill_router.common.errors import UserError
from prefill_serve.launcher.haproxy import environment, own_folder
from prefill_serve.launcher.serve_options import KeyConfig, ServeConfig


def serve(read: Callable[[], ServeConfig]) -> None:
    """Serves on the cluster that RAY_ADDRESS names, or with a Ray of its own on this machine, on loopback.

    `read` gives the config, and after SIGHUP the one of that moment. Raises UserError where there is no router to
    serve, or where others could reach an endpoint without keys.
    """
    read()  # what is wrong with it is said before Ray starts
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with ExitStack() as stack:
        if ray_address() is None:
            # Loopback alone; but replicas have a port for each other, on every address, which wants the token.
            ours["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            ours |= environment(stack.enter_context(own_folder()))
        stack.enter_context(_set(ours))
        from prefill_serve.launcher.foreground import run  # Ray reads its environment while it is imported

        run(read)


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets those of the environment's variables that are not set, until the block ends."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def make_key(read: Callable[[], KeyConfig]) -> None:
    """Prints a new key, and adds its hash to the file. Raises UserError where the name has one there."""
    config = read()
    text = storage.read_bytes(config.keys).decode() if storage.exists(config.keys) else ""
    if text and config.name in storage.read_toml(config.keys):
        raise UserError(
            f"{config.keys}: {config.name} has a key there: take its line out first, or choose another name"
        )
    key = f"pr-{secrets.token_urlsafe(32)}"
    line = f'{config.name} = "sha256:{hashlib.sha256(key.encode()).hexdigest()}"\n'
    storage.write_bytes(config.keys, f"{text.rstrip()}\n{line}".lstrip().encode())
    typer.echo(key)
