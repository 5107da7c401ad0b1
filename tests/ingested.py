"""Runs `ingest` and reads its tables back with the readers that jobs use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prefill_jobs.ingest_job import ingest as run
from prefill_jobs.options import IngestConfig
from prefill_router import storage
from prefill_router.corpus import reader
from prefill_router.ingest.tables import IngestSummary
from prefill_router.outcomes import load_outcomes, target_names

FIXTURES = Path(__file__).parent / "fixtures" / "ingest"


@dataclass(frozen=True)
class Ingested:
    prompts: dict[str, reader.Prompt]  # by their ids
    outcomes: dict[tuple[str, str], tuple[float, int | None]]  # by prompt and target: correct, output_tokens
    costs: dict[tuple[str, str], float]  # by prompt and target, without unknown ones
    extras: dict[str, dict[str, Any]]  # other columns of the corpus, by prompt id
    quarantine: list[tuple[str, int, str | None, str]]  # file name, row, prompt_id, reason
    summary: IngestSummary


def ingest(format: str, source: Path | str, out: Path | str, **options: Any) -> Ingested:  # noqa: A002
    summary = run(IngestConfig(format=format, source=str(source), out=str(out), **options))
    stored = storage.read_json(f"{out}/summary.json")
    assert stored == json.loads(json.dumps(summary.to_dict()))
    prompts, extras = _corpus(str(out))
    rows = _outcomes(str(out)) if summary.outcomes else []
    outcomes = {(row["prompt_id"], row["target"]): (row["correct"], row["output_tokens"]) for row in rows}
    costs = {(row["prompt_id"], row["target"]): row["cost_usd"] for row in rows if row["cost_usd"] is not None}
    assert summary.prompts == len(prompts)
    assert summary.outcomes == len(outcomes)
    return Ingested(prompts, outcomes, costs, extras, _quarantine(str(out)), summary)


def _corpus(out: str) -> tuple[dict[str, reader.Prompt], dict[str, dict[str, Any]]]:
    prompts, extras = dict[str, reader.Prompt](), dict[str, dict[str, Any]]()
    for file in storage.list_files(f"{out}/corpus", [".parquet"]):
        for _, _, row in reader.read(file):
            assert isinstance(row, reader.Row)
            assert row.prompt_id not in prompts
            prompts[row.prompt_id] = row.prompt
        for fields in storage.read_table(file).to_pylist():
            own = ("prompt_id", "prompt", "messages")
            extras[fields["prompt_id"]] = {key: value for key, value in fields.items() if key not in own}
    return prompts, extras


def _outcomes(out: str) -> list[dict[str, Any]]:
    load_outcomes(f"{out}/outcomes", target_names(f"{out}/outcomes"))  # raises for invalid tables
    files = storage.list_files(f"{out}/outcomes", [".parquet"])
    return [row for file in files for row in storage.read_table(file).to_pylist()]


def _quarantine(out: str) -> list[tuple[str, int, str | None, str]]:
    uri = f"{out}/quarantine/rows.parquet"
    if not storage.exists(uri):
        return []
    with storage.open_parquet(uri) as file:
        assert isinstance(file, pq.ParquetFile)
        rows = file.read().to_pylist()
    return [(storage.name(row["file"]), row["row"], row["prompt_id"], row["reason"]) for row in rows]
