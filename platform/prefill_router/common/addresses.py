"""Checks of the addresses that a command listens on or connects to, made before it starts slow work."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from functools import lru_cache

from prefill_router.common.errors import UserError


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Raises UserError unless this process can listen on `host`:`port` now."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: choose another with --port") from None
        raise UserError(
            f"host = {host}, port = {port}: cannot listen on this address ({error.strerror}): "
            "choose another --host or --port"
        ) from None


def require_listener(address: str, name: str, wait_s: float = 10.0) -> None:
    """Raises UserError unless `address`, HOST:PORT, accepts a connection. `name` is the variable or flag it came from.

    Addresses of another form are not checked.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), wait_s).close()
    except OSError as error:
        raise UserError(f"{name} = {address}: cannot be reached ({error}): check that the cluster is running") from None


def ray_address() -> str | None:
    """Returns RAY_ADDRESS, the Ray cluster to join, or None if Ray is to start on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def token_refused(address: str) -> UserError:
    """Builds the error for a Ray cluster that rejects a missing or wrong token."""
    return UserError(
        f"RAY_ADDRESS = {address}: the Ray cluster refuses this token, or requires one: set RAY_AUTH_MODE=token "
        "and RAY_AUTH_TOKEN to the cluster's token, or write the token to ~/.ray/auth_token"
    )


@lru_cache  # asked for each request
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
