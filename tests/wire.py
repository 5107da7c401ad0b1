"""Requests as bytes on a socket."""

from __future__ import annotations

import socket
from contextlib import suppress


def exchange(port: int, *pieces: bytes, wait_s: float = 60.0) -> bytes:
    """What comes for these bytes until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), wait_s) as client:
        with suppress(ConnectionError):  # whoever does not read to the end resets the connection
            for piece in pieces:
                client.sendall(piece)
        return read_to_end(client)


def read_to_end(client: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionError):
        while piece := client.recv(1 << 16):
            answer += piece
    return answer


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    """The bytes of a request; it asks for the connection's end after it."""
    return "\r\n".join([f"{line} HTTP/1.1", "Host: a", *headers, "Connection: close", "", ""]).encode() + body


def status_of(answer: bytes) -> int:
    """Of the first answer; 0 where there is none."""
    return int(answer.split(None, 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
