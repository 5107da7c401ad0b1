"""The addresses and ports on which a program's processes listen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from family import descendants


@dataclass(frozen=True)
class Listener:
    command: str
    address: str
    port: int


def listeners(tree: psutil.Process) -> Iterator[Listener]:
    """The listening TCP sockets of a process and its children, without those that end meanwhile."""
    try:
        processes = {process.pid: process for process in (tree, *descendants(tree))}
    except psutil.NoSuchProcess:
        return
    for connection in psutil.net_connections("tcp"):
        if connection.pid in processes and connection.status == psutil.CONN_LISTEN:
            try:
                command = " ".join(processes[connection.pid].cmdline())
            except psutil.NoSuchProcess:
                continue
            yield Listener(command, connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)


def addresses(tree: psutil.Process) -> set[str]:
    return {listener.address for listener in listeners(tree)}


def ports(tree: psutil.Process) -> set[int]:
    return {listener.port for listener in listeners(tree)}
