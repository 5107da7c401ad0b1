"""Jobs on a real Ray: several workers, and one that dies. Other tests of jobs run in process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from prefill_jobs.extract.extract_job import extract
from prefill_jobs.options import ExtractConfig, TrainConfig
from prefill_jobs.runtime import ray_failures, ray_tasks, shared_objects
from prefill_jobs.runtime.worker_notes import WorkerNote
from prefill_jobs.train import trunk_fit
from prefill_jobs.train.train_job import train
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.errors import UserError
from prefill_router.corpus.plan import plan
from prefill_router.predictor.data_loader import Window
from prefill_router.predictor.training import Trainer
from prefill_router.router.artifact import Router

PROMPTS = ["what is one plus two", "name a river in that old town"]


def extracted(small_data: Path, encoder: Path, out: Path, **options: Any) -> ActivationStore:
    corpus = str(small_data / "corpus.parquet")
    extract(ExtractConfig(**{"corpus": corpus, "encoder": str(encoder), "out": str(out), "shard_rows": 20, **options}))
    return ActivationStore.open(str(out))


def trained(activations: str, small_data: Path, out: Path, **options: Any) -> Router:
    outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
    given = {"activations": activations, "outcomes": outcomes, "pool": pool, "out": str(out), "seeds": 4, "keep": 2}
    return train(TrainConfig(**{**given, **options}))


def test_two_actors_write_the_same_store_as_one_process(
    local_ray: None, activations: str, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """`activations` was extracted in process."""
    store = extracted(small_data, tiny_model, tmp_path / "out", shard_rows=50, workers=2)
    alone = ActivationStore.open(activations)
    assert [shard.file for shard in store.manifest.shards] == [shard.file for shard in alone.manifest.shards]


def test_a_failure_in_an_actor_is_the_users_error_and_leaves_no_manifest(
    local_ray: None, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="layer 9 is out of range"):
        extracted(small_data, tiny_model, tmp_path / "out", layers="9")
    with pytest.raises(UserError, match="no finished extraction"):
        ActivationStore.open(str(tmp_path / "out"))


def test_a_corpus_is_planned_by_a_cluster_as_it_is_here(local_ray: None, small_data: Path) -> None:
    corpus = str(small_data / "corpus.parquet")
    here, there = plan(corpus, 20), plan(corpus, 20, spread=ray_tasks.spread)
    assert len(here.shards) == 12
    assert (there.shards, there.repeats, there.bad) == (here.shards, here.repeats, here.bad)
    np.testing.assert_array_equal(there.keys, here.keys)


def test_the_latest_note_of_a_worker_reaches_the_driver(local_ray: None) -> None:
    note = WorkerNote()
    assert note.read() is None
    for _ in ray_tasks.map_items(note.write, ["load"]):
        assert note.read() == "load"
    note.remove()
    assert note.read() is None


def test_workers_share_one_object(local_ray: None) -> None:
    shared = shared_objects.Shared(Counts)
    seen = ray_tasks.map_items(partial(count, counts=shared), range(6))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]


def test_what_workers_share_outlives_its_process(local_ray: None) -> None:
    shared, kept = shared_objects.Shared(Counts), shared_objects.Shared(Counts, is_kept=True)
    for counts, expected in ((shared, [1, 2, 1, 2]), (kept, [1, 2, 3, 4])):
        seen = [counts.call("add"), counts.call("add")]
        process = counts.call("process")
        ray.kill(counts._actor, no_restart=False)
        while counts.call("process") == process:  # it stays alive for a moment
            time.sleep(0.05)
        assert [*seen, counts.call("add"), counts.call("add")] == expected


def test_a_call_that_is_made_again_is_answered_and_not_done_again(tmp_path: Path) -> None:
    first = shared_objects._Object(Counts, (), str(tmp_path))
    assert [first.call(name, "add") for name in ("a", "b", "a")] == [1, 2, 1]
    restarted = shared_objects._Object(Counts, (), str(tmp_path))
    assert [restarted.call(name, "add") for name in ("b", "c")] == [2, 3]


def test_what_ray_ends_is_one_line_with_the_rest_in_a_file(local_ray: None) -> None:
    for method, what in (("end", "ActorDiedError: The actor died"), ("fail", "ZeroDivisionError: of ours")):
        with (
            pytest.raises(
                UserError,
                match=f"^Ray failed the job: .*{what}.*: run the job again to resume .*; full log: ",
            ) as e,
            ray_failures.as_user_errors(),
        ):
            ray.get(getattr(ray.remote(Fragile).remote(), method).remote())
        assert "\n" not in str(e.value)
        details = Path(str(e.value).rpartition("full log: ")[2])
        assert "Traceback" in details.read_text()
        details.unlink()
    with pytest.raises(UserError, match=r"^corpus.csv: column prompt is missing$"), ray_failures.as_user_errors():
        ray.get(ray.remote(Fragile).remote().refuse.remote())


class Fragile:
    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise ZeroDivisionError("of ours")

    def refuse(self) -> None:
        raise UserError("corpus.csv: column prompt is missing")


class Counts:
    def __init__(self) -> None:
        self.number = 0

    def add(self) -> int:
        self.number += 1
        return self.number

    def process(self) -> int:
        return os.getpid()


def count(_: int, counts: shared_objects.Shared) -> int:
    return int(counts.call("add"))


def test_two_workers_learn_what_one_process_does(
    local_ray: None, router: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    """`router` was trained in process."""
    other = trained(activations, small_data, tmp_path / "two", workers=2)
    alone = Router.load(router)
    for a, b in zip(other.predict(PROMPTS), alone.predict(PROMPTS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    assert other.training["metrics"]["best_epochs"] == alone.training["metrics"]["best_epochs"]


@pytest.fixture(scope="module")
def undisturbed(
    local_ray: None, activations: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Router, Path]:
    """A router fitted by one Ray Train worker, and its folder."""
    out = tmp_path_factory.mktemp("undisturbed") / "router"
    return trained(activations, small_data, out), out


def test_a_run_leaves_nothing_of_ray_train_behind(undisturbed: tuple[Router, Path]) -> None:
    names = storage.list_names(str(undisturbed[1]))
    assert [name for name in names if not name.endswith(".safetensors")] == ["router.json"]


def test_one_worker_learns_what_one_process_does(undisturbed: tuple[Router, Path], router: str) -> None:
    """`router` was trained in process."""
    for a, b in zip(undisturbed[0].predict(PROMPTS), Router.load(router).predict(PROMPTS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_worker_killed_amid_an_epoch_changes_nothing(
    undisturbed: tuple[Router, Path],
    activations: str,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kills the worker's process in the trainer's third epoch, once."""
    killed = tmp_path / "killed"
    whole_pass = Trainer.train

    def die_once(self: Trainer, window: Window) -> None:
        if self.epoch == 2 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        whole_pass(self, window)

    fit_worker = trunk_fit._fit_worker

    def worker_that_dies(config: dict[str, Any]) -> None:
        Trainer.train = die_once  # type: ignore[method-assign]
        fit_worker(config)

    monkeypatch.setattr(trunk_fit, "_fit_worker", worker_that_dies)
    resumed = trained(activations, small_data, tmp_path / "router")
    assert killed.exists()
    for a, b in zip(resumed.predict(PROMPTS), undisturbed[0].predict(PROMPTS), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow("a command line that trains on the run's Ray")
def test_ctrl_c_ends_a_training_and_says_how_to_go_on(
    ray_address: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    """Ray Train would handle it, say nothing, and wait for its workers."""
    flags = {"activations": activations, "outcomes": small_data / "outcomes.parquet", "pool": small_data / "pool.toml"}
    flags |= {"out": tmp_path / "router", "seeds": 32, "keep": 2, "workers": 1}
    arguments = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    environment = {name: value for name, value in os.environ.items() if name != "TEST_FORKS"}
    said, is_interrupted = [], False
    with subprocess.Popen(
        [sys.executable, "-m", "prefill_jobs", "train", *arguments],
        env={**environment, "RAY_ADDRESS": ray_address},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("train: starting the workers") and not is_interrupted:
                process.send_signal(signal.SIGINT)  # by then Ray Train would have taken the signal over
                is_interrupted = True
    assert process.returncode == 130, said
    assert said[-1] == "train: interrupted: the same command goes on from what is finished\n"
    assert not (tmp_path / "router" / "router.json").exists()
