"""Addresses that commands listen on, or join: checked before anything that takes long."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from prefill_router.common.errors import UserError


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Raises UserError unless a process of this machine can listen on `port` of `host` now."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: choose another with --port") from None
        raise UserError(
            f"host = {host}, port = {port}: cannot listen there ({error.strerror}): choose another --host or --port"
        ) from None


def require_listener(address: str, name: str, wait_s: float = 10.0) -> None:
    """Raises UserError unless somebody listens at HOST:PORT, as the variable or the flag `name` says."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), wait_s).close()
    except OSError as error:
        raise UserError(f"{name} = {address}: cannot be reached ({error}): is the cluster up?") from None


def ray_address() -> str | None:
    """The address of the Ray cluster to join, by RAY_ADDRESS; None where a Ray starts on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def token_refused(address: str) -> UserError:
    """The error of a Ray cluster that refuses our token, or that we have none."""
    return UserError(
        f"RAY_ADDRESS = {address}: the Ray cluster refuses this token, or the lack of one: set RAY_AUTH_MODE=token, "
        "and RAY_AUTH_TOKEN to the cluster's token, or put it in the file ~/.ray/auth_token"
    )


def is_loopback(host: str) -> bool:
    """Is `host` an address that only this machine can reach?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
