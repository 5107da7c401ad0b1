"""Every step from a corpus and outcomes to three routed prompts, for `demo` and `quickstart`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from prefill_jobs.evaluate.evaluate_job import evaluate
from prefill_jobs.extract.extract_job import extract
from prefill_jobs.options import EvaluateConfig, ExtractConfig, ProbeConfig, TrainConfig, WalkthroughConfig
from prefill_jobs.train.probe_job import run_probe
from prefill_jobs.train.train_job import train
from prefill_router import storage
from prefill_router.activations.commit_log import StoreConflictError
from prefill_router.common.console import doing
from prefill_router.common.errors import UserError
from prefill_router.common.money import usd
from prefill_router.corpus.plan import plan, read_shard
from prefill_router.corpus.reader import Prompt
from prefill_router.evaluation.results import Evaluation
from prefill_router.reports.evaluation_page import headline, metric_rows, neighbours_line
from prefill_router.reports.number_format import exactly
from prefill_router.reports.verdict import verdict

_NUM_REQUESTS = 3
_START_TIMEOUT_S = 180.0

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Inputs:
    corpus: str
    outcomes: str
    pool: str
    notice: str | None = None  # required in every report of these inputs
    layers: str = "all"


def walk(inputs: Inputs, config: WalkthroughConfig) -> None:
    """Extracts, probes, trains, evaluates, serves and routes; prints a summary and the report's path."""
    started = time.monotonic()
    activations, probes, router = (storage.join(config.out, name) for name in ("activations", "probe", "router"))
    graded: dict[str, Any] = {
        "activations": activations,
        "outcomes": inputs.outcomes,
        "ignore_unknown": config.limit is not None,
    }

    step("Extract: the encoder's prefill")
    _extract(
        ExtractConfig(
            corpus=inputs.corpus,
            encoder=config.encoder,
            layers=inputs.layers,
            out=activations,
            limit=config.limit,
        )
    )
    step("Probe: the layer that best separates right from wrong answers, for each target")
    run_probe(ProbeConfig(**graded, pool=inputs.pool, out=probes))
    step("Train: SharedTrunkNet on Ray Train")
    train(TrainConfig(**graded, pool=inputs.pool, out=router, seed=config.seed, overwrite=True))
    step("Evaluate: on held-out prompts")
    report = storage.join(config.out, "report")
    evaluation = evaluate(EvaluateConfig(**graded, router=router, out=report, probe=probes), inputs.notice)
    with doing("stopping Ray, since the endpoint starts its own"):
        ray.shutdown()
    step("Serve: encoder and head in one replica")
    with doing(""), _endpoint(router, config.port) as url:  # which says itself what it is doing
        for prompt in _sample(inputs.corpus, config.limit):
            _route(url, prompt)
    _summary(evaluation, inputs.notice, f"{report}/report.html", time.monotonic() - started)
    console.print(_next_command(evaluation, router), markup=False)


def _extract(config: ExtractConfig) -> None:
    """Resumes an earlier extraction of the same prompts by the same encoder; overwrites any other."""
    try:
        extract(config)
    except StoreConflictError:
        extract(config.model_copy(update={"overwrite": True}))


def _next_command(evaluation: Evaluation, router: str) -> str:
    tolerance, serve = verdict(evaluation).tolerance, f"prefill-router serve --router {router}"
    if tolerance is None:
        return f"To try the router all the same: {serve}"
    flag = "" if tolerance == evaluation.tolerance else f" --tolerance {exactly(tolerance)}"
    return f"Serve it: {serve}{flag}"


def step(title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def _sample(uri: str, limit: int | None) -> list[Prompt]:
    """A few prompts, spread over the corpus."""
    shards = plan(uri, shard_rows=64, limit=limit).shards
    picked = np.linspace(0, len(shards) - 1, _NUM_REQUESTS + 2)[1:-1].round().astype(int)
    return [read_shard(shards[i])[0].prompt for i in picked]


# --- the endpoint, started and called as by a user ---------------------------------------------------------------


@contextmanager
def _endpoint(router: str, port: int) -> Iterator[str]:
    """Runs `prefill-router serve` until the block ends; yields its URL once it is ready."""
    command = [sys.executable, "-m", "prefill_jobs", "serve", "--router", router, "--port", str(port)]
    process = subprocess.Popen(command, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        with doing("stopping the endpoint"):
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UserError(
                f"the endpoint exited with status {process.returncode} before it was ready: see its log above"
            )
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise UserError(f"the endpoint at {url} was not ready after {_START_TIMEOUT_S:.0f} s: see its log above")


def _route(url: str, prompt: Prompt) -> None:
    body = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    sent = time.monotonic()
    response = httpx.post(f"{url}/v1/route", json=body, timeout=60, trust_env=False)
    latency_ms = (time.monotonic() - sent) * 1e3
    if not response.is_success:
        raise UserError(f"the endpoint returned status {response.status_code}: {response.text}")
    decision = response.json()
    target = decision["selected_model"]
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    console.print(f"POST /v1/route  {text[:70]!r}", markup=False)
    console.print(
        f"  -> {target}: P(correct) {decision['p_correct'][target]:.2f}, "
        f"{usd(decision['expected_cost_usd'][target])} expected, {latency_ms:.0f} ms",
        markup=False,
    )


def _summary(evaluation: Evaluation, notice: str | None, report: str, elapsed_s: float) -> None:
    step("Summary")
    if notice:
        console.print(notice)
    table = Table("held-out prompts", "prefill router", "k nearest neighbours", box=None)
    ours = metric_rows(evaluation.router, evaluation.quality)
    knn = evaluation.standing("knn_activations")
    neighbours = metric_rows(knn.scores, evaluation.quality) if knn else [(name, "–") for name, _ in ours]
    for (name, value), (_, other) in zip(ours, neighbours, strict=True):
        table.add_row(name, value, other)
    console.print(table)
    console.print(
        "Each uses its own tolerance, chosen on validation prompts; areas under curves cover every tolerance."
    )
    if knn:
        console.print(neighbours_line(knn))
    console.print(str(verdict(evaluation)), markup=False, highlight=False)
    console.print(headline(evaluation))
    console.print(f"\nReport: {report}\nDone in {elapsed_s:.0f} s.", markup=False)
