"""Jobs submitted to a real cluster of several raylets, which come and go while the jobs run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.experimental import internal_kv
from ray.job_submission import JobStatus

from command import Command
from prefill_jobs.extract.extract_job import extract
from prefill_jobs.label.label_job import label
from prefill_jobs.options import ExtractConfig, InspectConfig, LabelConfig, SubmitConfig, TrainConfig
from prefill_jobs.submit.submission import JobFailedError, Submission, submit
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.router.artifact import Router
from serving import wait_until
from tiny import random_prompts

NUM_PROMPTS, SHARD_ROWS = 240, 4
PROMPTS = ["what is one plus two", "name a river in that old town"]
NODE = {"num_cpus": 2, "object_store_memory": 120_000_000, "dashboard_agent_listen_port": 0}
FAST_HEALTH = {  # a node that was killed refuses to answer at once; one that is slow to answer is alive
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def still_connected() -> Iterator[None]:
    """Keeps this process's connection to the run's Ray, which each node that starts here takes over."""
    client = internal_kv.internal_kv_get_gcs_client()
    yield
    internal_kv._internal_kv_reset()
    if client is not None:
        internal_kv._initialize_internal_kv(client)


class RealCluster:
    """A head with a dashboard; raylets can be added and killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster, self._num_added = Cluster(), 0
        with still_connected():
            head = self._cluster.add_node(**{**NODE, "num_cpus": 1}, include_dashboard=True, dashboard_port=0)
        self.address = f"http://{head.webui_url}"

    def add(self) -> Any:
        self._num_added += 1
        # As on a machine of its own: a raylet that starts empties the folder where it keeps jobs' code.
        folder = f"runtime_resources_{self._num_added}"
        with still_connected():
            return self._cluster.add_node(**NODE, runtime_env_dir_name=folder)

    def kill(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        with still_connected():
            self._cluster.shutdown()


@pytest.fixture(scope="module")
def real_cluster() -> Iterator[RealCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # which `serve` sets where it runs: those of another Ray
            patch.delenv(name, raising=False)
        for name, value in FAST_HEALTH.items():
            patch.setenv(name, value)
        cluster = RealCluster()
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory outside the repository, with a corpus that takes a while."""
    folder = tmp_path_factory.mktemp("elsewhere")
    prompts = random_prompts(NUM_PROMPTS, seed=3)
    with (folder / "corpus.jsonl").open("w") as lines:
        lines.writelines(json.dumps({"prompt_id": f"c{i}", "prompt": p}) + "\n" for i, p in enumerate(prompts))
    return folder


def to(cluster: RealCluster, submission_id: str, **options: Any) -> SubmitConfig:
    return SubmitConfig(address=cluster.address, submission_id=submission_id, **options)


def followed(job: Submission) -> str:
    """What a job says, once it has succeeded."""
    said: list[str] = []
    job.follow(said.append)
    assert job.details.status == JobStatus.SUCCEEDED
    return "".join(said)


def command_line(cluster: RealCluster, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """`prefill-router submit` as its user runs it, in a directory outside the repository."""
    command = [sys.executable, "-m", "prefill_jobs", "submit", *map(str, arguments), "--address", cluster.address]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def commits(out: Path) -> int:
    folder = out / "commits"
    return len(list(folder.glob("*.json"))) if folder.exists() else 0


def wait_for(done: Callable[[], int], number: int, is_over: Callable[[], bool]) -> None:
    wait_until(lambda: done() >= number or is_over(), f"{number} parts")
    assert done() >= number


def has_ended(job: Submission) -> bool:
    return job.details.status.is_terminal()


def files_below(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.rglob(pattern)) if folder.exists() else 0


def encoded(out: Path) -> dict[str, np.ndarray[Any, Any]]:
    store = ActivationStore.open(str(out))
    found = {}
    for shard in range(store.num_shards):
        ids, columns = store.read(shard, [ActivationColumn.parse("last_001")])
        found.update(zip(ids.to_pylist(), columns["last_001"], strict=True))
    return found


def decisions(out: Path) -> dict[int, str]:
    """The target of each line."""
    table = pq.read_table(out / "decisions")
    return dict(zip(table["row"].to_pylist(), table["target"].to_pylist(), strict=True))


def test_a_job_is_submitted_followed_and_asked_for_and_runs_once(
    real_cluster: RealCluster, router: str, router_of_two: str, command: Command
) -> None:
    """The quickest job there is: others start processes for seconds each."""
    config, where = InspectConfig(router=router), to(real_cluster, "quick")
    job = submit(config, where)
    version = Router.load(router).version
    assert version in followed(job)
    ended = job.details.end_time
    again = submit(config, where)
    assert version in followed(again)  # its log, again
    assert again.details.end_time == ended
    with pytest.raises(UserError, match="belongs to another job"):
        submit(InspectConfig(router=router_of_two), where)
    address = {"address": real_cluster.address}
    assert command("submit", "status", "quick", **address).out == "SUCCEEDED\n"
    assert version in command("submit", "logs", "quick", **address).out
    assert "quick  SUCCEEDED" in command("submit", "list", **address).out


@pytest.mark.slow("raylets that come and go")
def test_a_job_is_as_undisturbed_while_raylets_come_and_go(
    in_process: None, real_cluster: RealCluster, elsewhere: Path, tiny_model: Path
) -> None:
    options = ["extract", "--corpus", "corpus.jsonl", "--encoder", tiny_model, "--layers", "1", "--pooling", "last"]
    options += ["--shard-rows", SHARD_ROWS, "--workers", 3]
    second, out = real_cluster.add(), elsewhere / "disturbed"
    process = command_line(real_cluster, elsewhere, *options, "--out", out)
    wait_for(lambda: commits(out), 10, lambda: process.poll() is not None)
    real_cluster.kill(second)
    wait_for(lambda: commits(out), 30, lambda: process.poll() is not None)
    third = real_cluster.add()
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert f"{NUM_PROMPTS:,} prompts" in said
    assert json.loads((out / "summary.json").read_text())["prompts"] == NUM_PROMPTS
    calm = {"corpus": str(elsewhere / "corpus.jsonl"), "encoder": str(tiny_model), "layers": "1", "pooling": "last"}
    extract(ExtractConfig(**calm, shard_rows=SHARD_ROWS, out=str(elsewhere / "quiet")))
    disturbed, quiet = encoded(out), encoded(elsewhere / "quiet")
    assert disturbed.keys() == quiet.keys()
    assert all(np.allclose(disturbed[i], quiet[i], atol=2e-3) for i in quiet)
    real_cluster.kill(third)


@pytest.mark.slow("raylets that come and go")
def test_training_and_labelling_are_as_undisturbed_while_raylets_come_and_go(
    in_process: None, real_cluster: RealCluster, small_data: Path, activations: str, router: str, elsewhere: Path
) -> None:
    node, out = real_cluster.add(), elsewhere / "road"
    graded = {"activations": activations, "outcomes": str(small_data / "outcomes.parquet")}
    train = {**graded, "pool": str(small_data / "pool.toml"), "workers": 2, "seeds": 4, "keep": 2}
    job = submit(TrainConfig.model_validate({**train, "out": str(out / "router")}), to(real_cluster, "train"))
    wait_for(lambda: files_below(out / "router" / "_runs", "state.safetensors"), 1, lambda: has_ended(job))
    real_cluster.kill(node)  # with both workers: the head has no room for them
    node = real_cluster.add()
    assert "router" in followed(job)
    learnt, expected = (Router.load(str(uri)).predict(PROMPTS) for uri in (out / "router", router))
    for ours, theirs in zip(learnt, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)

    log = {"router": router, "log": str(small_data / "corpus.parquet"), "shard_rows": 4}
    config = LabelConfig.model_validate({**log, "workers": 2, "out": str(out / "labels")})
    job = submit(config, to(real_cluster, "label"))
    wait_for(lambda: files_below(out / "labels" / "estimates", "part-*.parquet"), 10, lambda: has_ended(job))
    real_cluster.kill(node)
    node = real_cluster.add()
    followed(job)
    label(LabelConfig.model_validate({**log, "out": str(out / "quiet-labels")}))
    labelled, quiet = (decisions(out / name) for name in ("labels", "quiet-labels"))
    assert len(labelled) == 240
    assert labelled == quiet
    real_cluster.kill(node)


@pytest.mark.slow("two more jobs on a real cluster, and a command line")
def test_a_job_that_fails_or_is_stopped_says_so_by_its_status(
    real_cluster: RealCluster, elsewhere: Path, tiny_model: Path, command: Command
) -> None:
    bad = ["extract", "--corpus", "none.jsonl", "--encoder", tiny_model, "--out", elsewhere / "bad"]
    process = command_line(real_cluster, elsewhere, *bad, "--submission-id", "bad")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "none.jsonl: no such corpus" in said
    status = command("submit", "status", "bad", address=real_cluster.address)
    assert (status.status, status.out) == (1, "FAILED\n")

    long = {"corpus": str(elsewhere / "corpus.jsonl"), "encoder": str(tiny_model), "shard_rows": 1, "layers": "1"}
    job = submit(ExtractConfig(**long, out=str(elsewhere / "long")), to(real_cluster, "long"))
    wait_for(lambda: commits(elsewhere / "long"), 5, lambda: has_ended(job))
    stopped = command("submit", "stop", "long", address=real_cluster.address)
    assert (stopped.status, stopped.out) == (0, "STOPPED\n")
    followed_to_its_end = command("submit", "logs", "long", "--follow", address=real_cluster.address)
    assert followed_to_its_end.status == 1
    assert "long: STOPPED" in followed_to_its_end.err


@pytest.mark.slow("one more job on a real cluster")
def test_a_job_without_its_secret_ends_before_it_begins(real_cluster: RealCluster, router: str) -> None:
    job = submit(InspectConfig(router=router), to(real_cluster, "secret", secrets="NOBODY_HAS_THIS_KEY"))
    with pytest.raises(JobFailedError) as failed:
        job.follow(lambda _text: None)
    assert failed.value.exit_code == 1
    assert "secret NOBODY_HAS_THIS_KEY is not set on the cluster" in job.logs
    assert Router.load(router).version not in job.logs
