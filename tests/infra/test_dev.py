"""`make s3` and `make cluster`: they start, accept connections from this machine only, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest

from family import descendants
from listeners import addresses
from manifests import INFRA, ROOT
from ports import free_port


@contextmanager
def running(script: str, **variables: object) -> Iterator[tuple[dict[str, str], psutil.Process]]:
    """The variables that the script prints for export, and its process. Ends it as Ctrl-C does."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [INFRA / "dev" / script]
    # A new session, so that SIGINT reaches only these processes, as Ctrl-C reaches those of a terminal.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    everything = []
    try:
        with process.stdout as said:
            words = said.readline().split()
        assert words[0] == "export"
        tree = psutil.Process(process.pid)
        everything = [tree, *descendants(tree)]
        yield dict(word.split("=", 1) for word in words[1:]), tree
        everything += descendants(tree)  # later children also write to its folder
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            status = process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    _, left = psutil.wait_procs(everything, timeout=120)
    assert (status, left) == (0, [])


def test_an_s3_server_with_a_bucket() -> None:
    program = (
        "from prefill_router import storage as s; s.write_bytes('s3://b-1/x', b'y'); print(s.read_bytes('s3://b-1/x'))"
    )
    with running("s3.sh", PORT=free_port(), BUCKET="b-1") as (exported, tree):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **exported}, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "b'y'", done.stderr
        assert addresses(tree) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("script", "variable"), [("s3.sh", "PORT"), ("cluster.sh", "PORT"), ("cluster.sh", "DASHBOARD_PORT")]
)
def test_a_port_that_is_taken_is_said(script: str, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"PORT": str(free_port()), variable: str(port)}
        done = subprocess.run(
            [INFRA / "dev" / script], env={**os.environ, **ports}, capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port} is taken" in done.stderr
    assert variable in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def ray_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="pr-", dir="/tmp")  # socket paths must be short
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow("a Ray of two nodes")
def test_a_cluster_of_two_nodes(ray_folder: str) -> None:
    dashboard = free_port()
    variables = {"PORT": free_port(), "DASHBOARD_PORT": dashboard, "CPUS": 1, "RAY_TMPDIR": ray_folder}
    program = "import ray; ray.init(logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
    with running("cluster.sh", **variables) as (exported, tree):
        assert addresses(tree) == {"127.0.0.1"}
        url = f"http://127.0.0.1:{dashboard}/api/jobs/"
        assert httpx.get(url, timeout=120).status_code == 401
        token = {"authorization": f"Bearer {exported['RAY_AUTH_TOKEN']}"}
        assert httpx.get(url, headers=token, timeout=120).json() == []
        assert answer(program, exported) == "2"


def answer(program: str, exported: dict[str, str]) -> str:
    """What a program that joins the cluster prints, at its second try if the first fails or takes two minutes.

    Once in some hundred runs, a process got no connection to a cluster that had just answered others, and Ray tries
    on in that process for 14 minutes; on a busy machine it gives up after 30 s.
    """
    command = [sys.executable, "-c", program]
    said = "no connection"
    for seconds in (120, 240):
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command, env={**os.environ, **exported}, capture_output=True, text=True, timeout=seconds, check=False
            )
            if done.returncode == 0:
                return done.stdout.strip()
            said = done.stderr
    raise AssertionError(said)


@pytest.mark.slow("a Ray of one node")
def test_a_cluster_that_lost_a_process_ends(ray_folder: str) -> None:
    ports = {"PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
    with subprocess.Popen(
        [INFRA / "dev" / "cluster.sh"],
        env={**os.environ, **ports, "CPUS": "1", "NODES": "1", "RAY_TMPDIR": ray_folder},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        everything = descendants(psutil.Process(process.pid))
        next(child for child in everything if child.name() == "raylet").kill()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.startswith("cluster: raylet ended: the logs in ")
    assert psutil.wait_procs(everything, timeout=120)[1] == []


def test_make_calls_them() -> None:
    for target in ("s3", "cluster"):
        done = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/dev", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip().endswith(f"infra/dev/{target}.sh"), done.stdout + done.stderr
