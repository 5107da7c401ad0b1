"""Every dashboard panel shows data: a real Prometheus scrapes a real Ray under load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from collected import write_prompts
from ending import ended
from family import descendants
from gateway import write_pool
from manifests import INFRA
from ports import free_port
from prometheus import Prometheus, metrics_in, panels, watching
from serving import Serve, serving, wait_until
from upstream import Upstream

# Panels without data on this machine, and the reason.
EMPTY = {
    "GPUs in use": "no GPU",
    "GPU memory in use": "no GPU",
}
WITHOUT_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}
# Ray exports a counter on its first increment. These stay at zero here; their panels show 0, or the value
# of all encoders in place of each one's.
DID_NOT_HAPPEN = {
    "ray_prefill_router_encoder_drift_distance_bucket",
    "ray_prefill_router_job_quarantined_rows_total",
    "ray_prefill_router_job_retries_total",
    "ray_prefill_router_job_reused_rows_total",
    "ray_prefill_router_truncated_prompts_total",
    "ray_prefill_router_upstream_refusals_total",
}
SLOW_TRAINING = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}  # per epoch: a rate needs two scrapes during training
_JOBS = """
import json, sys
from prefill_jobs.cli.command_line import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise
"""


@contextmanager
def ray_cluster() -> Iterator[Path]:
    """Runs `make cluster` with one node, and yields its folder. Processes started in the context join the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="pr-", dir="/tmp"))  # socket paths must be short
    with pytest.MonkeyPatch.context() as patch:
        ours = {"NODES": "1", "CPUS": "4", "PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
        ours |= {"RAY_TMPDIR": str(folder), "RAY_worker_niceness": "0"}
        ours |= {"RAY_metrics_report_interval_ms": "3000", "REPORTER_UPDATE_INTERVAL_MS": "2000"}
        for name, value in ours.items():
            patch.setenv(name, value)
        process = subprocess.Popen([INFRA / "dev" / "cluster.sh"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            for setting in process.stdout.readline().split()[1:]:
                patch.setenv(*setting.split("=", 1))
            yield folder / "ray"
        finally:
            tree = descendants(psutil.Process(process.pid))
            ended(process)
            psutil.wait_procs(tree, timeout=120)  # until then they write to the folder
            process.stdout.close()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def asking(serve: Serve) -> Iterator[None]:
    """Sends routing requests, calls and conversations in the background; upstreams fail at times."""
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=serve.url, timeout=120) as client:
            for n in range(1_000_000):
                if stop.wait(0.8):
                    return
                fault = "[[fault:503@big]][[fault:503@small]]" if n % 5 == 0 else ""
                client.post("/v1/route", json={"prompt": f"what is {n % 97} plus one"})
                # Every seventh is too long to route and goes to the default target.
                question = "one " * 100 if n % 7 == 0 else f"what is {n % 50} minus one {fault}"
                messages = [{"role": "user", "content": question}]
                session = {"x-session-id": str(n // 3)}
                call = {"messages": messages, "stream": n % 2 == 0}
                client.post("/v1/chat/completions", json=call, headers=session)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run_jobs(tiny_model: Path, small_data: Path, pool: str, folder: Path) -> None:
    store, prompts = folder / "activations", write_prompts(folder / "corpus.jsonl", 30)
    refused = {"prompt_id": "p30", "prompt": "what is [[fault:503@big]]", "reference": ["-"]}
    prompts.write_text(f"{json.dumps(refused)}\n{prompts.read_text()}")
    extract = {
        "corpus": small_data / "corpus.parquet",
        "encoder": tiny_model,
        "out": store,
        "shard-rows": 10,
        "workers": 2,
    }
    train = {"activations": store, "outcomes": small_data / "outcomes.parquet", "pool": small_data / "pool.toml"}
    train |= {"out": folder / "router", "seeds": 2, "keep": 2, "max-epochs": 20, "workers": 2}
    collect = {"corpus": prompts, "pool": pool, "grader": "exact", "out": folder / "collected", "shard-rows": 10}
    collect |= {"budget-usd": 1, "attempts": 2}
    jobs = [
        [name, *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]
        for name, flags in {"extract": extract, "train": train, "collect": collect}.items()
    ]
    command, environment = [sys.executable, "-c", _JOBS, json.dumps(jobs)], {**os.environ, **SLOW_TRAINING}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def nothing_in(prometheus: Prometheus) -> list[str]:
    """The queries of panels without data."""
    return [
        f"{name}: {target['expr']}"
        for name, panel in panels()
        for target in panel["targets"]
        if panel["title"] not in EMPTY and not prometheus.has_data(target["expr"])
    ]


@pytest.mark.prometheus
@pytest.mark.slow("a Ray, an endpoint and three jobs under a real Prometheus")
def test_every_panel_shows_something(router: str, small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in ("big", "small")}
        paced = {"upstream": {"requests_per_minute": 90}}  # a rate needs two scrapes while the job runs
        pool = write_pool(tmp_path / "pool.toml", upstreams, big=paced, small=paced)
        (tmp_path / "budgets.toml").write_text("usd_per_day = 1.0\n")
        prometheus = stack.enter_context(watching(stack.enter_context(ray_cluster()), tmp_path))
        flags = {"pool": pool, "budgets": tmp_path / "budgets.toml", "shadow": router, "max_prompt_tokens": 64}
        serve = stack.enter_context(serving(router, **flags, threads=1, max_replicas=2))
        stack.enter_context(asking(serve))
        run_jobs(tiny_model, small_data, pool, tmp_path)
        wait_until(lambda: not nothing_in(prometheus), f"{nothing_in(prometheus)}")
        asked = {name for _, panel in panels() for target in panel["targets"] for name in metrics_in(target["expr"])}
        assert asked - prometheus.names() <= WITHOUT_GPUS | DID_NOT_HAPPEN
        alerts = [rule["name"] for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]
        assert "NothingScraped" in alerts
