"""Requests as raw bytes: valid ones, and those that two servers in a row may parse differently."""

from __future__ import annotations

import socket
from contextlib import suppress

# Status codes of refusals by HAProxy, uvicorn and the gate; 0 is a connection reset while the client still sends. A
# failing replica gives none of these.
REFUSED = {0, 400, 401, 403, 404, 405, 408, 413, 415, 501}


def exchange(port: int, *pieces: bytes, wait_s: float = 60.0) -> bytes:
    """Sends these bytes, and reads until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), wait_s) as client:
        with suppress(ConnectionError):  # a server that does not read everything resets the connection
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
    """The bytes of a JSON request from this machine with `Connection: close`."""
    first = [f"{line} HTTP/1.1", "Host: 127.0.0.1", *["Content-Type: application/json"] * line.startswith("POST")]
    return "\r\n".join([*first, *headers, "Connection: close", "", ""]).encode() + body


def status_of(answer: bytes) -> int:
    """The status code of the first answer, 0 if there is none."""
    return int(answer.split(None, 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def _chunked(*headers: str, body: bytes = b"0\r\n\r\n") -> bytes:
    return request("POST /v1/route", *headers, body=body)


def _of_length(*lengths: str, more: tuple[str, ...] = (), body: bytes = b"{}") -> bytes:
    return request("POST /v1/route", *(f"Content-Length: {length}" for length in lengths), *more, body=body)


# A second request in the body of the first, which no server may parse as a request.
_INNER = b"GET /v1/smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_INNER), _INNER)

# Source: RFC 9112, 6.3 and 11.2; Kettle, "HTTP Desync Attacks", 2019.
ATTACKS = {
    "CL.TE": _chunked(f"Content-Length: {5 + len(_INNER)}", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + _INNER),
    "TE.CL": _chunked("Content-Length: 4", "Transfer-Encoding: chunked", body=_CHUNK),
    "TE.TE, one unknown": _chunked("Transfer-Encoding: chunked", "Transfer-Encoding: x", body=b"0\r\n\r\n" + _INNER),
    "TE that is no chunked": _chunked("Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + _INNER),
    "TE, then identity": _chunked("Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + _INNER),
    "space before the colon": _chunked("Transfer-Encoding : chunked", "Content-Length: 5", body=b"0\r\n\r\n" + _INNER),
    "TE after a tab": _chunked("Transfer-Encoding:\tchunked", "Content-Length: 5", body=b"0\r\n\r\n" + _INNER),
    "TE folded onto another header": _of_length(
        str(5 + len(_INNER)), more=("X: 1\r\n Transfer-Encoding: chunked",), body=b"0\r\n\r\n" + _INNER
    ),
    "a length that is folded": _of_length("\r\n 2"),
    "two lengths": _of_length("2", "43", body=b"{}" + _INNER),
    "the same length twice": _of_length("2", "2"),
    "a list of lengths": _of_length("2, 43", body=b"{}" + _INNER),
    "a length with a sign": _of_length("+2"),
    "a length below zero": _of_length("-2"),
    "a length in hex": _of_length("0x2"),
    "a length of 5,000 digits": _of_length("9" * 5000),
    "a length of 5,000 zeros": _of_length("0" * 5000 + "2"),
    "a chunk of 2**68 bytes": _chunked("Transfer-Encoding: chunked", body=b"fffffffffffffffff\r\n" + _INNER),
    "a chunk below zero": _chunked("Transfer-Encoding: chunked", body=b"-1\r\n" + _INNER),
    "a chunk's line of 100,000 bytes": _chunked(
        "Transfer-Encoding: chunked", body=b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n"
    ),
    "NUL in a header": _of_length("2", more=("X: a\0b",)),
    "a lone CR in a header": _of_length("2", more=("X: a\rTransfer-Encoding: chunked",)),
    "a header without a name": _of_length("2", more=(": x",)),
    "a header of 1 MiB": _of_length("2", more=("X: " + "a" * (1 << 20),)),
    "10,000 headers": _of_length("2", more=tuple(f"X{n}: a" for n in range(10_000))),
    "a path of 1 MiB": request("GET /" + "a" * (1 << 20)),
    "HTTP/0.9": b"GET /v1/route\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"\0" * 160,
    "a tunnel": request("CONNECT a:22"),
    "an upgrade": request("GET /v1/stats", "Upgrade: h2c", "HTTP2-Settings: AA"),
    "another host's URL": request("GET http://example.com/v1/stats"),
}
