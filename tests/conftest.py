"""Fixtures of all tests, built once per run: the tiny model, a small corpus with outcomes, a router, a real Ray."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from command import Command
from prefill_router.common import console
from run import Run
from s3 import s3_bucket  # noqa: F401
from scheduling import RaysInOneProcess, rays_first
from selection import leave_out
from tiny import save_small_data, save_tiny_model, save_tiny_sentence_encoder

# A run in the background ignores these, and the processes that tests start would, too.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# As in an activated environment: processes that tests start find this Python and its programs.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not help with tiny matrices
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else other processes take precedence
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")  # interval at which each node's agent scans its processes


# No deadline, since the machine may be busy.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items)
    rays_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RaysInOneProcess | None:
    return RaysInOneProcess(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes by their argument: xdist needs the same names in each process, and compressed bytes hold a time."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With the shared data present, every test can run, so a skipped test fails."""
    report = yield
    if report.skipped and SHARED.is_dir():
        report.outcome, report.longrepr = "failed", f"skipped, though {SHARED} exists: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.of(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def forks(run: Run) -> Iterator[None]:
    """Has the processes that tests start fork from one that has imported what takes them longest; see `forks`."""
    folder = str(Path(__file__).parent / "forks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_FORKS", str(run.fork()))
        patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def tiny_model(run: Run) -> Path:
    return run.build("tiny_model", save_tiny_model)


@pytest.fixture(scope="session")
def tiny_sentence_encoder(run: Run) -> Path:
    return run.build("tiny_sentence_encoder", save_tiny_sentence_encoder)


@pytest.fixture(scope="session")
def small_data(run: Run) -> Path:
    """A folder with corpus.parquet, outcomes.parquet and pool.toml; see `save_small_data`."""
    return run.build("small_data", save_small_data)


@pytest.fixture(scope="session")
def ray_address(run: Run, s3_bucket: str) -> str:  # noqa: F811
    """The address of this run's Ray. Its workers inherit the variables that `s3_bucket` sets."""
    return run.serve("ray")["address"]


@pytest.fixture(scope="session")
def local_ray(ray_address: str) -> Iterator[None]:
    """The Ray of this run, for jobs in this process. Jobs see two CPUs; it has more, for the run's other processes."""
    import ray

    from prefill_jobs.runtime import cluster

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    ray.init(ray_address, **quiet)
    cluster.connect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_total", lambda resource: 2.0 if resource == "CPU" else 0.0)
        patch.setattr(cluster, "_gpus_by_node", lambda: [0.0])
        yield
    ray.shutdown()


@pytest.fixture(scope="session")
def activations(run: Run, tiny_model: Path, small_data: Path) -> str:
    """Activations of all layers of the tiny model on the small corpus."""
    from here import without_ray
    from prefill_jobs.extract.extract_job import extract
    from prefill_jobs.options import ExtractConfig

    def build(out: Path) -> None:
        corpus = str(small_data / "corpus.parquet")
        with without_ray():
            extract(ExtractConfig(corpus=corpus, encoder=str(tiny_model), out=str(out), shard_rows=50))

    return str(run.build("activations", build))


@pytest.fixture(scope="session")
def router(run: Run, activations: str, small_data: Path) -> str:
    """A router trained on `activations`."""
    from here import without_ray
    from prefill_jobs.options import TrainConfig
    from prefill_jobs.train.train_job import train

    def build(out: Path) -> None:
        outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
        with without_ray():
            train(TrainConfig(activations=activations, outcomes=outcomes, pool=pool, out=str(out), seeds=4, keep=2))

    return str(run.build("router", build))


@pytest.fixture(scope="session")
def router_of_two(run: Run, activations: str, tiny_sentence_encoder: Path, small_data: Path) -> str:
    """A router trained on the activations of the tiny model and the tiny sentence encoder. It reads both."""
    from here import without_ray
    from prefill_jobs.extract.extract_job import extract
    from prefill_jobs.options import ExtractConfig, TrainConfig
    from prefill_jobs.train import sensor_choice
    from prefill_jobs.train.train_job import train

    def keep_all(*given: Any) -> list[sensor_choice.SensorTrial]:
        of_encoders = {option.encoder: option for option in given[2]}
        return [sensor_choice.SensorTrial(option, True, 0.0, 0.0, 0.0) for option in of_encoders.values()]

    def build(out: Path) -> None:
        corpus, other = str(small_data / "corpus.parquet"), str(run.folder / "sentence_activations")
        outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
        both = f"{activations},{other}"
        with without_ray(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sensor_choice, "choose_sensors", keep_all)
            extract(ExtractConfig(corpus=corpus, encoder=str(tiny_sentence_encoder), out=other, shard_rows=50))
            train(TrainConfig(activations=both, outcomes=outcomes, pool=pool, out=str(out), seeds=4, keep=2))

    return str(run.build("router_of_two", build))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: more only slow down tiny products on a busy machine."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def no_plots() -> Iterator[Callable[..., list[str]]]:
    """Leaves out the plots of reports, which take longer than a tiny job. Yields the function that draws them."""
    from prefill_router.reports import figures

    with pytest.MonkeyPatch.context() as patch:
        drawing = figures.in_both_widths
        patch.setattr(figures, "in_both_widths", lambda _draw, _data: [])
        yield drawing


@pytest.fixture
def plots(no_plots: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the plots of reports all the same."""
    monkeypatch.setattr("prefill_router.reports.figures.in_both_widths", no_plots)


@pytest.fixture(scope="module")
def in_process(no_plots: Callable[..., list[str]]) -> Iterator[None]:
    """Runs the jobs of a module's tests without Ray; see `here`."""
    from here import without_ray

    with without_ray():
        yield


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("_SAID_AFTER_S", "_SAID_EVERY_S"):  # what else a command says depends on no clock
        monkeypatch.setattr(console, name, math.inf)
    return Command(capsys)
