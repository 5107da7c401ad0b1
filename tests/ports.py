"""Free ports for servers that cannot choose one themselves."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RAYS = range(10_002, 32_000)  # for Ray's workers, and above them the replicas
_kept: list[socket.socket] = []  # until this process ends


def free_port() -> int:
    """A port that stays free until the caller's server binds it; no other process of these tests gets it.

    A port from the system could be given to another program before the server binds it. This one is outside the
    system's ephemeral range, and a name in the abstract socket namespace reserves it among tests.
    """
    ephemeral = range(*map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()))
    ports = [port for port in range(8_300, 65_536) if port not in ephemeral and port not in _RAYS]
    random.shuffle(ports)
    return next(port for port in ports if _keep(port))


def _keep(port: int) -> bool:
    claim, probe = socket.socket(socket.AF_UNIX), socket.socket()
    with probe:
        try:
            claim.bind(f"\0prefill-router-tests-{port}")
            probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            return False
    _kept.append(claim)
    return True
