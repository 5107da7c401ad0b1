"""A Ray that a job starts on this machine is closed to other machines and to processes without its token."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray._private import ray_constants

from command import Command
from family import descendants
from listeners import addresses, ports
from prefill_jobs.runtime import cluster, local_ray
from prefill_router.common.errors import UserError
from tokens import refusing_token

_LOOPBACK = {"127.0.0.1"}
_OWN = """
import sys
import ray
from prefill_jobs.runtime import cluster
cluster.connect()
ray.get(ray.remote(lambda: None).remote())
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
_JOINED = """
from prefill_jobs.runtime import cluster
from prefill_jobs.cli.command_line import _reported
with _reported():
    cluster.connect()
"""


def users_environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a user without any Ray settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "NCCL_"))}
    return {**kept, "HOME": str(home), **variables}


@contextmanager
def running(arguments: list[str], home: Path) -> Iterator[psutil.Popen]:
    command = [sys.executable, *arguments]
    process = psutil.Popen(
        command,
        env=users_environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    tree: list[psutil.Process] = []
    try:
        yield process
        tree = descendants(process) if process.is_running() else []
    finally:
        try:
            process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        psutil.wait_procs(tree, timeout=120)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def own_ray(home: Path) -> Iterator[tuple[psutil.Popen, str]]:
    """A process that connected like a job, and the address of its Ray."""
    with running(["-c", _OWN], home) as process:
        address = process.stdout.readline().strip()
        assert address, process.stderr.read()
        yield process, address


@pytest.mark.slow("a Ray of its own")
def test_it_listens_on_loopback_and_leaves_no_token_in_the_home_folder(own_ray: Any, home: Path) -> None:
    process, address = own_ray
    assert address.startswith("127.0.0.1:")
    assert len(ports(process)) > 5
    assert addresses(process) == _LOOPBACK
    assert list(home.iterdir()) == []


@pytest.mark.slow("a Ray of its own")
def test_without_its_token_it_answers_nothing_but_metrics(own_ray: Any) -> None:
    num_metrics = 0
    for port in ports(own_ray[0]):
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/job_agent/jobs/x", timeout=60)
        except httpx.RemoteProtocolError:  # a gRPC port
            continue
        num_metrics += answer.text.startswith("# HELP")
        assert answer.status_code == 401 or answer.text.startswith("# HELP")
    assert num_metrics > 0


@pytest.mark.slow("a Ray of its own")
@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}], ids=["none", "wrong"])
def test_a_job_without_its_token_is_told_so_in_one_line(own_ray: Any, home: Path, token: dict[str, str]) -> None:
    environment = users_environment(home, RAY_ADDRESS=own_ray[1], **token)
    done = subprocess.run([sys.executable, "-c", _JOINED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"prefill-router: RAY_ADDRESS = {own_ray[1]}: the Ray cluster refuses this token")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow("a training of two workers, with a Ray of its own")
def test_workers_that_train_listen_on_loopback(activations: str, small_data: Path, tmp_path: Path) -> None:
    flags = {"activations": activations, "outcomes": small_data / "outcomes.parquet", "pool": small_data / "pool.toml"}
    flags |= {"out": tmp_path / "router", "seeds": 1, "keep": 1, "max-epochs": 2, "workers": 2}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    found: set[str] = set()
    with running(["-m", "prefill_jobs", "train", *arguments], Path.home()) as process:
        while process.poll() is None:
            found |= addresses(process)
            time.sleep(1)  # looking takes a while itself
        assert process.returncode == 0, process.stderr.read()
    assert found == _LOOPBACK


def test_its_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    before, tokens = dict(os.environ), set()
    for _ in range(2):
        with local_ray.private():
            assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
            assert ray_constants.ENABLE_RAY_CLUSTER is False
            os.environ["RAY_AUTH_MODE"] = "token"  # as Ray does
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
        assert dict(os.environ) == before
    assert len(tokens) == 2
    assert all(len(token) == 64 for token in tokens)


def test_a_token_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with local_ray.private():
        assert os.environ["RAY_AUTH_TOKEN"] == "0" * 64
    assert os.environ["RAY_AUTH_TOKEN"] == "0" * 64


@pytest.fixture
def refusing() -> Iterator[str]:
    with refusing_token() as address:
        yield address


def test_a_token_that_is_refused_is_one_line_before_ray_tries(
    command: Command, refusing: str, monkeypatch: pytest.MonkeyPatch, activations: str, small_data: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda *_, **__: pytest.fail("Ray tries"))
    monkeypatch.setenv("RAY_ADDRESS", refusing)
    graded = {"activations": activations, "outcomes": small_data / "outcomes.parquet", "pool": small_data / "pool.toml"}
    result = command("probe", **graded, out=tmp_path / "probe")
    assert result.status == 1
    assert f"RAY_ADDRESS = {refusing}: the Ray cluster refuses this token" in result.err
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in result.err
    assert result.err.count("\n") == 1


def test_ray_that_does_not_take_a_driver_is_one_line(monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
    """The cluster may answer although the driver is on none of its nodes."""

    def not_taken(*_arguments: object, **_options: object) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {refusing}")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", not_taken)
    monkeypatch.setattr(cluster, "GcsClient", lambda **_: None)
    monkeypatch.setenv("RAY_ADDRESS", refusing)
    with pytest.raises(UserError, match=r"run the job on one of the cluster's nodes, with its RAY_AUTH_TOKEN"):
        cluster.connect()
