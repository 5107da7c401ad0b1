"""HAProxy's config, what it does with replicas that die, and the folder of its files.

What it does with callers is in test_wire.py; Serve runs it in e2e/test_serving.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from haproxies import Recorder, haproxy_before, haproxy_config
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_serve.launcher import command, haproxy
from prefill_serve.middleware.attempts import HEADER
from serving import wait_until
from wire import exchange, read_to_end, request, status_of


@pytest.fixture
def config(tmp_path: Path) -> str:
    """What the Ray that is installed writes, with HAProxy's statistics on every address and its metrics nowhere."""
    settings = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        socket_path=str(tmp_path / "admin.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        metrics_socket_path=str(tmp_path / "metrics.sock"),
        stats_port=8404,
        metrics_port=0,
    )
    path = tmp_path / "haproxy.cfg"
    HAProxyApi(settings, config_file_path=str(path))._generate_config_file_internal()
    return path.read_text()


def test_nothing_but_the_endpoint_is_bound_for_others(config: str) -> None:
    patched = haproxy.patched(config, Path("/tmp/x"))
    binds = [line.strip() for line in patched.splitlines() if line.strip().startswith("bind")]
    assert binds == ["bind /tmp/x/0.sock mode 600", "bind 127.0.0.1:8000", "bind 127.0.0.1:8404"]
    assert "mode 666" in config
    assert "mode 666" not in patched


def test_requests_are_held_whole_and_errors_are_ours(config: str) -> None:
    patched = haproxy.patched(config, Path("/tmp/x"))
    assert "    option redispatch 1\n    option http-buffer-request\n" in patched
    errors = [line.split()[1:] for line in patched.splitlines() if line.strip().startswith("errorfile")]
    assert errors == [[str(status), f"/tmp/x/{status}.http"] for status in haproxy.ERRORS]


@pytest.mark.parametrize(
    ("status", "said", "code", "header"),
    [
        (408, 408, "request_timeout", "connection: close"),
        (500, 500, "internal_error", "cache-control: no-cache"),
        (502, 500, "replicas_lost", "x-should-retry: false"),
        (503, 503, "unavailable", "retry-after: 2"),
        (504, 503, "unavailable", "retry-after: 2"),
    ],
)
def test_an_error_of_haproxys_has_the_shape_of_all_others(status: int, said: int, code: str, header: str) -> None:
    head, _, body = haproxy.error_answer(status).partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {said} ")
    assert header in head
    assert f"content-length: {len(body)}" in head
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize(
    ("words", "others"),
    [
        ("bind *:8404", "bind [::]:8404"),
        ("bind :0", "bind 0.0.0.0:0"),
        ("bind :0", "bind :0\n    bind *:9000 proto h2"),
        (" mode 666 level admin", " mode 777 level admin"),
        ("option redispatch 1", "option redispatch 2"),
        ("errorfile 503", "http-error status 503 file"),
        ("frontend http_frontend", "frontend http"),
    ],
)
def test_a_config_that_is_not_known_is_refused(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, others: str
) -> None:
    """Whatever was missed might listen on every address: nothing is started."""
    assert words in config
    changed = config.replace(words, others)
    with pytest.raises(UserError, match=r"Ray .* generates an unsupported HAProxy config: .*: install a Ray"):
        haproxy.patched(changed, tmp_path)
    path = tmp_path / "haproxy.cfg"
    path.write_text(changed)
    monkeypatch.setattr(sys, "argv", [haproxy.PROGRAM, "-db", "-f", str(path)])
    monkeypatch.setattr(os, "execv", lambda *_arguments: pytest.fail("HAProxy was started"))
    with pytest.raises(SystemExit, match=f"{haproxy.PROGRAM}: Ray .* generates an unsupported HAProxy config"):
        haproxy.main()


def test_the_ray_that_is_installed_is_one_that_is_asked_for() -> None:
    """The config of one that is not has never been looked at."""
    project = storage.read_toml(str(Path(__file__).parents[3] / "pyproject.toml"))["project"]
    (asked,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    installed = Version(version("ray"))
    assert installed in asked.specifier
    assert Version(f"{installed.major}.{installed.minor + 1}.0") not in asked.specifier


# --- requests that end replicas ---------------------------------------------------------------------------------------


def test_a_request_that_ends_replicas_is_not_carried_to_all_of_them() -> None:
    """Serve's own limit is no help: HAProxy counts refused connections too. Attempts have one name."""
    replicas = [Recorder(dies=True) for _ in range(8)]
    with haproxy_before([replica.port for replica in replicas]) as proxy:
        forged = f"{HEADER}: 00000000-0000-0000-0000-000000000000"
        answer = exchange(proxy.port, request("POST /v1/route", forged, "Content-Length: 2", body=b"{}"))
        got = [piece for replica in replicas for piece in replica.got]
        names = {line for piece in got for line in piece.splitlines() if line.startswith(HEADER.encode())}
        assert (status_of(answer), b'"replicas_lost"' in answer) == (500, True)
        assert len(got) == 5
        assert len(names) == 1
        assert forged.encode() not in names
    for replica in replicas:
        replica.close()


def test_a_request_whose_replica_died_goes_to_one_that_lives() -> None:
    """Also where half of the replicas are dead, of which HAProxy does not know yet."""
    dying, living, dead = Recorder(dies=True), Recorder(), [Recorder(), Recorder()]
    for replica in dead:
        replica.close()
    with haproxy_before([replica.port for replica in (dying, *dead, living)]) as proxy:
        answer = exchange(proxy.port, request("POST /v1/route", "Content-Length: 2", body=b"{}"))
        assert status_of(answer) == 200
        assert len(dying.got) <= 1
        assert len(living.got) == 1
    for replica in (dying, living):
        replica.close()


@pytest.mark.parametrize("by_the_same_caller", [False, True])
def test_where_nothing_is_left_to_try_a_caller_is_told_so(by_the_same_caller: bool) -> None:
    """HAProxy closes a caller's connection without a word once it has reused one to a replica for the request."""
    replicas = [Recorder(for_good=True), Recorder(for_good=True)]
    kept = request("POST /v1/route", "Content-Length: 2", body=b"{}").replace(b"Connection: close\r\n", b"")
    with haproxy_before([replica.port for replica in replicas]) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), 60) as caller:
            for _ in range(4):
                caller.sendall(kept)
                assert status_of(caller.recv(1 << 16)) == 200
            for replica in replicas:
                replica.dies = True
            last = request("POST /v1/route", "Content-Length: 2", body=b"{}")
            if by_the_same_caller:
                caller.sendall(last)
                answer = read_to_end(caller)
            else:
                answer = exchange(proxy.port, last)
        assert (status_of(answer), b'"unavailable"' in answer) == (503, True)
        assert sum(len(replica.got) for replica in replicas) == 6


@pytest.mark.parametrize("num_before", [0, 4])
def test_a_request_that_ends_all_replicas_comes_to_what_serve_falls_back_to(num_before: int) -> None:
    """Four retries are enough for two deaths and two refusals, and for no connection of before that is dead too."""
    replicas, fallback = [Recorder(for_good=True, waits_s=0.5) for _ in range(2)], Recorder()
    one = request("POST /v1/route", "Content-Length: 2", body=b"{}")
    with haproxy_before([replica.port for replica in replicas], fallback=fallback.port) as proxy:
        with ThreadPoolExecutor(4) as callers:
            before = list(callers.map(lambda _: status_of(exchange(proxy.port, one)), range(num_before)))
        assert before == [200] * num_before
        for replica in replicas:
            replica.got.clear()
            replica.dies = True
        assert status_of(exchange(proxy.port, one)) == 200
    assert [len(each.got) for each in (*replicas, fallback)] == [1, 1, 1]
    fallback.close()


def test_an_answer_that_takes_long_outlives_its_haproxy() -> None:
    """Which is replaced where replicas come or go, and is given time for the slowest answer, and for a long stream."""
    replica = Recorder(waits_s=2.0)
    with haproxy_before([replica.port]) as proxy, ThreadPoolExecutor(1) as caller:
        assert f"hard-stop-after {60 * 60}s" in {line.strip() for line in proxy.config.read_text().splitlines()}
        answering = caller.submit(exchange, proxy.port, request("GET /v1/stats"))
        wait_until(lambda: replica.got, "a request that is under way")
        with proxy.replaced():
            assert proxy.process.poll() is None
            assert status_of(answering.result()) == 200
            wait_until(lambda: proxy.process.poll() is not None, "the end of the old HAProxy", 60)
    replica.close()


@pytest.mark.parametrize(("status", "code"), [(500, "internal_error"), (503, "unavailable")])
def test_what_serve_says_of_its_actors_reaches_no_caller(status: int, code: str) -> None:
    said = b"The actor died: pid=17, ip: 10.0.0.1"
    head = f"HTTP/1.1 {status} X\r\ncontent-type: text/plain\r\ncontent-length: {len(said)}\r\n\r\n"
    replica = Recorder(answer=head.encode() + said)
    with haproxy_before([replica.port]) as proxy:
        answer = exchange(proxy.port, request("GET /v1/stats"))
    replica.close()
    assert status_of(answer) == status
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == code
    assert b"10.0.0.1" not in answer


def test_errors_of_the_api_pass_as_they_are() -> None:
    said = b'{"error": {"code": "not_ready"}}'
    head = f"HTTP/1.1 503 X\r\ncontent-type: application/json\r\ncontent-length: {len(said)}\r\n\r\n"
    replica = Recorder(answer=head.encode() + said)
    with haproxy_before([replica.port]) as proxy:
        assert exchange(proxy.port, request("GET /v1/stats")).endswith(said)
    replica.close()


@pytest.mark.parametrize("line", ["GET /ready", "POST /v1/route"])
def test_before_the_first_replica_runs_callers_are_told_so_in_time(line: str) -> None:
    """Serve holds a request until a replica runs."""
    held = Recorder(waits_s=60.0)
    limit = {"http-request set-timeout server": "100ms"}
    with haproxy_before([], changed=limit, fallback=held.port) as proxy:
        answer = exchange(proxy.port, request(line, "Content-Length: 2", body=b"{}"))
    held.close()
    assert status_of(answer) == 503
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "not_ready"
    assert "the first one loads the router and its encoder" in error["message"]


def test_once_a_replica_has_run_only_a_probe_is_told_soon_that_none_does(tmp_path: Path) -> None:
    """A request waits for the replica that takes the place of a dead one."""
    serves = [haproxy_config(tmp_path, 1, ports) for ports in ((), (2,), ())]
    limits = [
        [line.strip() for line in haproxy.patched(config, tmp_path).splitlines() if "set-timeout server" in line]
        for config in serves
    ]
    always, of_probes = "http-request set-timeout server 5s", "http-request set-timeout server 5s if { path /ready }"
    assert limits == [[always], [of_probes], [of_probes]]


def test_before_the_endpoint_is_deployed_no_path_is_called_unknown(config: str) -> None:
    patched = haproxy.patched(config, Path("/tmp/x"))
    assert "status 404" in config
    assert "status 404" not in patched
    assert "backend default_backend\n    http-request return status 503 default-errorfiles\n" in patched


# --- its folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(haproxy, "_FOLDERS", str(tmp_path))
    return tmp_path


def test_a_folder_ends_with_its_block(folders: Path) -> None:
    def interrupted() -> None:
        with haproxy.own_folder() as folder:
            (folder.path / "node").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(folders.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next(folders: Path) -> None:
    """And none of a process that lives, or that is somebody else's."""
    holding = (
        "import sys; from prefill_serve.launcher import haproxy; haproxy._FOLDERS = sys.argv[1]\n"
        "with haproxy.own_folder() as folder: print(folder.path, flush=True); sys.stdin.read()"
    )
    (folders / "pr-of-others").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(folders)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        with haproxy.own_folder():
            assert left.is_dir()
        other.kill()
    assert left.is_dir()
    with haproxy.own_folder() as folder:
        assert sorted(folders.iterdir()) == sorted([folder.path, folders / "pr-of-others"])


def test_a_serve_that_is_refused_leaves_no_folder_and_no_variable(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefill_serve.launcher.serve_options import ServeConfig

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    with pytest.raises(UserError, match="no router found"):
        command.serve(lambda: ServeConfig(router="/nowhere"))
    assert list(folders.iterdir()) == []
    assert dict(os.environ) == before
