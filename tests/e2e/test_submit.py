"""Jobs submitted to a real cluster of several raylets, which come and go while the jobs run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefill_jobs.label import label
from prefill_router.config import LabelConfig
from prefill_router.features import ActivationStore
from prefill_router.router import Router
from prefill_router.schema import ActivationColumn
from prefill_router.strict import validate
from tiny import random_prompts

NUM_PROMPTS, SHARD_ROWS = 1000, 4
PROMPTS = ["what is one plus two", "name a river in that old town"]
NODE = {"num_cpus": 2, "object_store_memory": 120_000_000, "dashboard_agent_listen_port": 0}
FAST_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class RealCluster:
    """A head with a dashboard; raylets can be added and killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster, self._num_added = Cluster(), 0
        head = self._cluster.add_node(**{**NODE, "num_cpus": 1}, include_dashboard=True, dashboard_port=0)
        self.address = f"http://{head.webui_url}"

    def add(self) -> Any:
        self._num_added += 1
        # As on a machine of its own: a raylet that starts empties the folder where it keeps jobs' code.
        return self._cluster.add_node(**NODE, runtime_env_dir_name=f"runtime_resources_{self._num_added}")

    def kill(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
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


def submitted(cluster: RealCluster, folder: Path, *arguments: object, **popen: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prefill_jobs", "submit", *map(str, arguments), "--address", cluster.address]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen
    )


def ended(process: subprocess.Popen[str], timeout_s: float = 600.0) -> str:
    out, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, out
    return out


def commits(out: Path) -> int:
    folder = out / "commits"
    return len(list(folder.glob("*.json"))) if folder.exists() else 0


def wait_for(done: Callable[[], int], number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while done() < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{done()} of {number} after five minutes"
        time.sleep(0.05)


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


def test_a_job_is_as_undisturbed_while_raylets_come_and_go(
    real_cluster: RealCluster, elsewhere: Path, tiny_model: Path
) -> None:
    options = ["extract", "--corpus", "corpus.jsonl", "--encoder", tiny_model, "--layers", "1", "--pooling", "last"]
    options += ["--shard-rows", SHARD_ROWS, "--workers", 3]
    second = real_cluster.add()
    process = submitted(real_cluster, elsewhere, *options, "--out", elsewhere / "disturbed")
    wait_for(lambda: commits(elsewhere / "disturbed"), 40, process)
    real_cluster.kill(second)
    wait_for(lambda: commits(elsewhere / "disturbed"), 120, process)
    third = real_cluster.add()
    out = ended(process)
    assert f"{NUM_PROMPTS:,} prompts" in out
    summary = json.loads((elsewhere / "disturbed" / "summary.json").read_text())
    assert summary["prompts"] == NUM_PROMPTS
    ended(submitted(real_cluster, elsewhere, *options, "--out", elsewhere / "quiet"))
    disturbed, quiet = encoded(elsewhere / "disturbed"), encoded(elsewhere / "quiet")
    assert disturbed.keys() == quiet.keys()
    assert all(np.allclose(disturbed[i], quiet[i], atol=2e-3) for i in quiet)
    real_cluster.kill(third)


def test_training_and_labelling_are_as_undisturbed_while_raylets_come_and_go(
    real_cluster: RealCluster, small_data: Path, activations: str, router: str, elsewhere: Path
) -> None:
    node, out = real_cluster.add(), elsewhere / "road"
    graded = ["--activations", activations, "--outcomes", small_data / "outcomes.parquet"]
    train = ["train", *graded, "--pool", small_data / "pool.toml", "--workers", 2, "--seeds", 4, "--keep", 2]
    process = submitted(real_cluster, elsewhere, *train, "--out", out / "router")
    wait_for(lambda: files_below(out / "router" / "_runs", "state.safetensors"), 1, process)
    real_cluster.kill(node)  # with both workers: the head has no room for them
    node = real_cluster.add()
    assert "router" in ended(process)
    learnt, expected = (Router.load(str(uri)).predict(PROMPTS) for uri in (out / "router", router))
    for ours, theirs in zip(learnt, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)

    log = {"router": router, "log": str(small_data / "corpus.parquet"), "shard_rows": 2}
    options = (word for key, value in log.items() for word in (f"--{key.replace('_', '-')}", value))
    process = submitted(real_cluster, elsewhere, "label", *options, "--workers", 2, "--out", out / "labels")
    wait_for(lambda: files_below(out / "labels" / "estimates", "part-*.parquet"), 20, process)
    real_cluster.kill(node)
    node = real_cluster.add()
    ended(process)
    label(validate(LabelConfig, {**log, "out": str(out / "quiet-labels")}, "quiet"))
    labelled, quiet = (decisions(out / name) for name in ("labels", "quiet-labels"))
    assert len(labelled) == 240
    assert labelled == quiet
    real_cluster.kill(node)


def test_a_submission_id_runs_once_and_tells_what_became_of_it(
    real_cluster: RealCluster, elsewhere: Path, tiny_model: Path
) -> None:
    options = ["extract", "--corpus", "corpus.jsonl", "--encoder", tiny_model, "--limit", 8, "--layers", "1"]
    first = [*options, "--out", elsewhere / "once", "--submission-id", "once"]
    ended(submitted(real_cluster, elsewhere, *first))
    stamp = (elsewhere / "once" / "summary.json").stat().st_mtime_ns
    assert "8 prompts" in ended(submitted(real_cluster, elsewhere, *first))  # its log, again
    assert (elsewhere / "once" / "summary.json").stat().st_mtime_ns == stamp
    other = submitted(real_cluster, elsewhere, *options, "--out", elsewhere / "other", "--submission-id", "once")
    said, _ = other.communicate(timeout=300)
    assert other.returncode == 1
    assert "is that of another job" in said
    assert "SUCCEEDED" in ended(submitted(real_cluster, elsewhere, "status", "once"))
    assert "8 prompts" in ended(submitted(real_cluster, elsewhere, "logs", "once"))
    assert "once  SUCCEEDED" in ended(submitted(real_cluster, elsewhere, "list"))


def test_a_job_that_fails_or_is_stopped_says_so_by_its_status(
    real_cluster: RealCluster, elsewhere: Path, tiny_model: Path
) -> None:
    bad = ["extract", "--corpus", "none.jsonl", "--encoder", tiny_model, "--out", elsewhere / "bad"]
    process = submitted(real_cluster, elsewhere, *bad, "--submission-id", "bad")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "none.jsonl: no such corpus" in said
    status = submitted(real_cluster, elsewhere, "status", "bad")
    assert "FAILED" in status.communicate(timeout=300)[0]
    assert status.returncode == 1

    long = ["extract", "--corpus", "corpus.jsonl", "--encoder", tiny_model, "--shard-rows", 1, "--layers", "1"]
    process = submitted(real_cluster, elsewhere, *long, "--out", elsewhere / "long", "--submission-id", "long")
    wait_for(lambda: commits(elsewhere / "long"), 5, process)
    assert "STOPPED" in ended(submitted(real_cluster, elsewhere, "stop", "long"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "long: STOPPED" in said


def test_a_job_without_its_secret_ends_before_it_begins(
    real_cluster: RealCluster, elsewhere: Path, tiny_model: Path
) -> None:
    options = ["extract", "--corpus", "corpus.jsonl", "--encoder", tiny_model, "--out", elsewhere / "secret"]
    process = submitted(real_cluster, elsewhere, *options, "--secrets", "NOBODY_HAS_THIS_KEY")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "secret NOBODY_HAS_THIS_KEY is not set on the cluster" in said
    assert not (elsewhere / "secret").exists()
