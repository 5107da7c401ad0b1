"""What all tests share: the tiny model, a small corpus with outcomes, a real local Ray, a router trained there."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from browsers import CHROMIUM
from command import Command
from manifests import KUBECTL
from prometheus import PROMETHEUS, PROMTOOL
from s3 import s3_bucket  # noqa: F401
from tiny import POOL_TOML, random_prompts, save_tiny_model, save_tiny_sentence_encoder

# As in an activated environment: what tests start finds this Python and its programs.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads on tiny matrices only wait for each other
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")  # how often each node's agent looks at all its processes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU, or of a program, are left out where there is none: not skipped, for nobody meant to run them."""
    has = {
        "cuda": _has_cuda,
        "browser": lambda: CHROMIUM is not None,
        "kubectl": lambda: KUBECTL is not None,
        "prometheus": lambda: PROMETHEUS is not None and PROMTOOL is not None,
    }
    left_out = [
        i for i in items if any(i.get_closest_marker(mark) and not is_there() for mark, is_there in has.items())
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sentence_encoder(tmp_path_factory.mktemp("tiny_sentence_encoder"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.parquet, outcomes.parquet and pool.toml: 240 prompts and two targets.

    "small" is right on prompts that hold the word "one", "big" on nearly all; 5 % of the outcomes are missing.
    """
    folder = tmp_path_factory.mktemp("small_data")
    rng = np.random.default_rng(1)
    prompts = random_prompts(240, seed=1)
    ids = [f"p{i:03d}" for i in range(len(prompts))]
    pq.write_table(pa.table({"prompt_id": ids, "prompt": prompts, "note": ids}), folder / "corpus.parquet")
    rows = []
    for prompt_id, prompt in zip(ids, prompts, strict=True):
        chances = {"big": 0.9, "small": 0.95 if "one" in prompt.split() else 0.05}
        for target, chance in chances.items():
            if rng.random() > 0.05:
                tokens = int(rng.integers(20, 60)) + 3 * len(prompt.split())
                rows.append((prompt_id, target, float(rng.random() < chance), tokens))
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        {
            "prompt_id": columns[0],
            "target": columns[1],
            "correct": pa.array(columns[2], pa.float32()),
            "output_tokens": pa.array(columns[3], pa.int32()),
        }
    )
    pq.write_table(table, folder / "outcomes.parquet")
    (folder / "pool.toml").write_text(POOL_TOML)
    return folder


@pytest.fixture(scope="session")
def local_ray(s3_bucket: str) -> Iterator[None]:  # noqa: F811
    """One real Ray on this machine for all tests that need it. Its workers know the S3 server of `s3_bucket`."""
    import ray

    from prefill_jobs import cluster

    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=200_000_000, **quiet)
    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def activations(local_ray: None, tiny_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every layer of the tiny model on the small corpus."""
    from prefill_jobs.extract import extract
    from prefill_router.config import ExtractConfig

    out = str(tmp_path_factory.mktemp("store") / "activations")
    corpus = str(small_data / "corpus.parquet")
    extract(ExtractConfig(corpus=corpus, encoder=str(tiny_model), out=out, shard_rows=50))
    return out


@pytest.fixture(scope="session")
def router(activations: str, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A router trained on them."""
    from prefill_jobs.train import train
    from prefill_router.config import TrainConfig

    out = str(tmp_path_factory.mktemp("trained") / "router")
    outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
    train(TrainConfig(activations=activations, outcomes=outcomes, pool=pool, out=out, seeds=4, keep=2))
    return out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)
