"""`prefill-router serve` as users run it: a process with Ray, HAProxy and replicas, asked while things happen to it.

Most tests share one endpoint, and the last one kills it.
"""

from __future__ import annotations

import shutil
import socket
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gateway import write_pool
from listeners import listeners
from prefill_router import storage
from prefill_router.router.artifact import Router
from prefill_serve.client import RouteError, RouterClient
from serving import Serve, serving, wait_until
from upstream import Fault, Upstream
from wire import ATTACKS, REFUSED, exchange, read_to_end, status_of

QUESTION = "what is one plus two"
SLOW_ATTACK = "a chunk's line of 100,000 bytes"
PATIENT = {"threads": 1, "max_wait_s": 120}  # a busy machine is no reason to refuse


@contextmanager
def asking(serve: Serve, threads: int = 4) -> Iterator[Counter[Any]]:
    """Asks all the time, without retries; what is answered is counted, by status and version."""
    answers: Counter[Any] = Counter()
    stop = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=serve.url, timeout=300) as client:
            n = 0
            while not stop.wait(0.02):
                n += 1
                try:
                    response = client.post("/v1/route", json={"prompt": f"what is {n % 97} plus {number}"})
                    body = response.json()
                    answers[response.status_code, body.get("router_version", str(body))] += 1
                except Exception as error:
                    answers["failed", repr(error)] += 1

    workers = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield answers
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def servers_up(folder: Path) -> int:
    """How many replicas the HAProxy that answers new callers sends requests to."""
    (path,) = folder.glob("*/admin.sock")
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(path))
        admin.sendall(b"show stat\n")
        rows = [line.split(",") for line in read_to_end(admin).decode().splitlines()]
    return sum("REPLICA" in name and status == "UP" for _, name, *_, status in (row[:18] for row in rows if row[17:]))


def wait_for_more(answers: Counter[Any], number: int = 40) -> None:
    """Until so many more were answered, or one failed."""
    enough = answers.total() + number
    wait_until(lambda: answers.total() >= enough, f"{number} more answers")


@pytest.fixture(scope="module")
def published(router: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trained router, where a test may replace it."""
    out = tmp_path_factory.mktemp("published") / "router"
    shutil.copytree(router, out)
    return str(out)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream("big") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def two(published: str, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """An endpoint of two replicas, which is also a gateway: the last test but one calls its upstream."""
    patient = {"upstream": {"timeout_s": 600.0}}
    folder = tmp_path_factory.mktemp("pool")
    pool = write_pool(folder / "pool.toml", {"big": upstream, "small": upstream}, big=patient, small=patient)
    with serving(published, replicas=2, pool=pool, watch_s=0.5, **PATIENT) as serve:
        wait_until(lambda: len(serve.replicas()) == 2, "two replicas")
        yield serve


def test_a_decision_is_the_routers_own(two: Serve, router: str) -> None:
    expected = Router.load(router).route(QUESTION)
    with RouterClient(two.url, timeout_s=300) as client:
        answer = client.route(QUESTION)
        assert answer.selected_model == expected.target
        assert answer.p_correct == pytest.approx(expected.p_correct, abs=1e-3)
        batch = client.route_batch([QUESTION, [{"role": "user", "content": "name a river"}]], explain=True)
        assert [isinstance(item, RouteError) for item in batch] == [False, False]
        with pytest.raises(RouteError, match="nobody") as refused:
            client.route(QUESTION, models=["nobody"])
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        assert client.is_ready()


def test_a_replica_that_dies_takes_no_request_with_it(two: Serve) -> None:
    before = two.replicas()
    with asking(two) as answers:
        wait_for_more(answers)
        psutil.Process(min(before)).kill()
        wait_until(lambda: len(two.replicas() - before) == 1, "a new replica")
        wait_for_more(answers, 200)
    assert {status for status, _ in answers} == {200}, answers


def test_a_router_is_replaced_and_a_bad_one_refused_without_a_failed_request(two: Serve, published: str) -> None:
    """Replicas stay the same processes: only their heads change."""
    old, before = Router.load(published), two.replicas()
    new = replace(old, default_tolerance=0.5)
    with asking(two) as answers:
        wait_for_more(answers)
        new.save(published)
        two.reload("serve: reloaded")
        wait_until(lambda: answers[200, new.version] > 20, f"answers of {new.version}")
        (weights,) = Path(published).glob("*.safetensors")
        good = weights.read_bytes()
        weights.write_bytes(good[:-1] + b"x")
        two.reload("reload refused, settings unchanged")
        weights.write_bytes(good)
        wait_for_more(answers)
    assert {status for status, _ in answers} == {200}, answers
    assert {version for _, version in answers} == {old.version, new.version}
    assert two.replicas() == before


def test_replicas_take_over_a_published_router_without_a_signal(two: Serve, published: str) -> None:
    old, before = Router.load(published), two.replicas()
    new = replace(old, default_tolerance=0.25)
    with asking(two) as answers:
        wait_for_more(answers)
        new.save(published)
        wait_until(lambda: answers[200, new.version] > 20, f"answers of {new.version}")
    assert {status for status, _ in answers} == {200}, answers
    assert two.replicas() == before


def test_nothing_listens_for_others(two: Serve) -> None:
    """Each replica has a port of Ray's on every address, which wants Ray's token."""
    import grpc

    found = list(listeners(psutil.Process(two.process.pid)))
    assert any("gcs_server" in listener.command for listener in found)
    for listener in found:
        if listener.address != "127.0.0.1":
            assert "ray::ServeReplica" in listener.command, listener
            with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as refused:
                    call(b"", timeout=120)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_haproxy_runs_with_what_the_endpoint_gives_it(two: Serve) -> None:
    """As its process has read it, and as it says itself."""
    (process, *_) = two.processes("haproxy.cfg")
    config = Path(next(part for part in process.cmdline() if part.endswith("haproxy.cfg"))).read_text()
    settings = {line.strip() for line in config.splitlines()}
    assert {
        "maxconn 4096",
        "nbthread 2",
        "tune.bufsize 65536",
        "retry-on conn-failure empty-response",
        "retries 4",
        "option redispatch 1",
        "option http-buffer-request",
        "option disable-h2-upgrade",
        "option http-server-close",
        "timeout http-request 30s",
        "timeout http-keep-alive 90s",
        "timeout client 60s",
        "timeout server 600s",
        "hard-stop-after 3600s",
        f"bind 127.0.0.1:{two.port}",
    } <= settings
    sockets = [Path(word) for line in settings for word in line.split() if word.endswith(".sock")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in sockets if path.name != "metrics.sock"} == {0o600}
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(next(path for path in sockets if path.name == "admin.sock")))
        admin.sendall(b"show info\n")
        info = dict(line.split(": ", 1) for line in read_to_end(admin).decode().splitlines() if ": " in line)
    assert info["Version"].startswith("2.8.")
    assert (info["Maxconn"], info["Nbthread"]) == ("4096", "2")


@pytest.mark.slow("one of the attackers is waited for until its time is over")
def test_no_attack_is_the_endpoints_trouble(two: Serve) -> None:
    """No 5xx, no replica that ends, and no memory that is kept."""

    def attack(name: str) -> None:
        status = status_of(exchange(two.port, ATTACKS[name]))
        assert status in REFUSED or status == 200, name

    def attack_quickly() -> int:
        for name in ATTACKS:
            if name != SLOW_ATTACK:
                attack(name)
        members = [*two.processes("haproxy.cfg"), *map(psutil.Process, before)]
        return sum(int(process.memory_info().rss) for process in members)

    before = two.replicas()
    first = attack_quickly()
    with ThreadPoolExecutor(2) as attackers:
        list(attackers.map(attack, [SLOW_ATTACK] * 2))
    assert attack_quickly() - first < 64 << 20
    assert two.replicas() == before
    with RouterClient(two.url, timeout_s=300) as client:
        assert client.route(QUESTION).selected_model


def test_a_web_page_reaches_nothing_through_the_proxy(two: Serve) -> None:
    rebound = {"host": f"evil.example:{two.port}"}
    with httpx.Client(base_url=two.url, timeout=300) as client:
        for path in ("/v1/stats", "/v1/router", "/", "/docs"):
            assert client.get(path).status_code == 200
            assert client.get(path, headers=rebound).status_code == 403
        body = {"prompt": QUESTION}
        assert client.post("/v1/route", json=body, headers={"origin": "https://evil.example"}).status_code == 403
        plain = {"content-type": "text/plain"}
        assert client.post("/v1/route", content=b'{"prompt": "what is one"}', headers=plain).status_code == 415
        for probe in ("/health", "/ready"):
            assert client.get(probe, headers=rebound).json() == {"status": "ok"}
        assert client.get("/-/healthz", headers=rebound).status_code == 200
        assert client.get("/-/routes", headers=rebound).json() == {"/": "prefill-router"}
    with socket.create_connection(("127.0.0.1", two.port), 300) as bare:
        bare.sendall(b"GET /v1/stats HTTP/1.0\r\n\r\n")  # which needs no Host
        assert bare.recv(1024).split()[1] in (b"400", b"403")


@pytest.mark.slow("an endpoint of its own, which grows and shrinks")
def test_replicas_follow_the_load_and_keys_are_asked_for(router: str, tmp_path: Path, command: Any) -> None:
    keys = tmp_path / "keys.toml"
    made = command("key", "ann", keys=keys)
    assert (made.status, command("key", "ann", keys=keys).status) == (0, 1)
    key = made.out.strip()
    assert key not in keys.read_text()
    scaling = {"max_replicas": 2, "target_work_s": 0.005, "upscale_delay_s": 1, "downscale_delay_s": 3}
    with serving(router, keys=keys, cached_prompts=0, **PATIENT, **scaling) as serve:
        with RouterClient(serve.url) as stranger, pytest.raises(RouteError) as refused:
            stranger.route(QUESTION)
        assert refused.value.status == 401
        assert len(serve.replicas()) == 1
        with RouterClient(serve.url, key, timeout_s=300) as client:
            stop = threading.Event()

            def ask() -> None:
                while not stop.is_set():
                    client.route_batch([f"what is {n} plus {n % 9}" for n in range(200)])

            callers = [threading.Thread(target=ask) for _ in range(3)]
            for caller in callers:
                caller.start()
            try:
                wait_until(lambda: len(serve.replicas()) == 2, "a second replica")
            finally:
                stop.set()
                for caller in callers:
                    caller.join()
            wait_until(lambda: len(serve.replicas()) == 1, "one replica again")
            assert client.route(QUESTION).selected_model


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"router": "/nowhere"}, "no router found"),
        ({"host": "0.0.0.0"}, "set --keys"),
        ({"host": "example.org"}, "set --keys"),
        ({"tolerance": 2}, "tolerance"),
        ({"safe_target": "nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_served_is_one_line(router: str, command: Any, flags: dict[str, Any], reason: str) -> None:
    result = command("serve", **{"router": router, **flags})
    assert result.status == 1
    assert reason in result.err
    assert len(result.err.splitlines()) == 1


def test_commands_are_found_by_their_entry_points() -> None:
    project = storage.read_toml(str(Path(__file__).parents[2] / "pyproject.toml"))["project"]
    entries = project["entry-points"]["prefill_router.commands"]
    assert entries == {
        "serve": "prefill_serve.launcher.command:serve",
        "key": "prefill_serve.launcher.command:make_key",
    }


@pytest.mark.slow("two replicas are killed, and others started")
def test_a_request_that_ends_two_replicas_is_not_given_to_a_third(
    two: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    """Its log names the request; the replica goes on."""
    request_id, folder = f"ends-replicas-{tmp_path.name}", two.folder()
    assert folder is not None
    upstream.faults(Fault.HANG, rate=1.0)
    with ThreadPoolExecutor(1) as caller:
        wait_until(lambda: servers_up(folder) == 2, "two replicas that HAProxy knows")
        for _ in range(4):  # or no connection to a replica could be used again
            assert httpx.get(f"{two.url}/ready", timeout=300).status_code == 200
        call = {"model": "big", "messages": [{"role": "user", "content": QUESTION}]}
        url, headers = f"{two.url}/v1/chat/completions", {"x-request-id": request_id}
        answering = caller.submit(httpx.post, url, json=call, headers=headers, timeout=600)
        for attempt in (1, 2):
            wait_until(lambda n=attempt: len(upstream.completions) == n, f"attempt {attempt}")  # type: ignore[misc]
            (attempts,) = (folder / "attempts").iterdir()
            killed = int(attempts.read_text().split()[-1])
            psutil.Process(killed).kill()
        answer = answering.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "replicas_lost")
    assert answer.headers["x-should-retry"] == "false"
    assert len(upstream.completions) == 2
    assert not list((folder / "attempts").iterdir())
    logs = (Path(tempfile.gettempdir()) / "ray").glob("session_*/logs/serve/*.log")
    noted = [line for log in logs for line in log.read_text().splitlines() if request_id in line]
    assert any("request ended replicas" in line for line in noted), noted
    with RouterClient(two.url, timeout_s=300) as client:
        assert client.route(QUESTION).selected_model


def test_a_killed_command_leaves_no_port_behind(two: Serve) -> None:
    two.process.kill()
    two.process.wait(300)
    wait_until(lambda: not two.answers(), "a port that nobody holds")
