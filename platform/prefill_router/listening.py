"""Addresses that commands listen on: whether a port is free, checked before anything that takes long, and for whom."""

from __future__ import annotations

import errno
import ipaddress
import socket

from prefill_router.errors import UserError


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


def is_loopback(host: str) -> bool:
    """Is `host` an address that only this machine can reach?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
