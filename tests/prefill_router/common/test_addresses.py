"""Ports and addresses are checked before a command starts anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ports import free_port
from prefill_router.common.addresses import require_free, require_listener
from prefill_router.common.errors import UserError


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 with a listener that sets SO_REUSEPORT, as multi-process servers do."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_refused(taken: int, host: str) -> None:
    with pytest.raises(UserError, match=f"port {taken} of {host} is in use: choose another with --port"):
        require_free(taken, host)


def test_a_free_port_stays_free() -> None:
    port = free_port()
    require_free(port)
    require_free(port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(
        UserError, match=f"host = {host}, port = .*cannot listen on this address .*: choose another --host"
    ):
        require_free(free_port(), host)


def test_an_address_without_a_listener_is_refused() -> None:
    with pytest.raises(UserError, match=r"^RAY_ADDRESS = 127\.0\.0\.1:\d+: cannot be reached \(.*refused\): "):
        require_listener(f"127.0.0.1:{free_port()}", "RAY_ADDRESS")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        require_listener(f"127.0.0.1:{listener.getsockname()[1]}", "RAY_ADDRESS")
    require_listener("auto", "RAY_ADDRESS")
