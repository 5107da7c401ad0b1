"""From another project's graded answers to a router: ingest, extract, train."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from command import Command
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


def write_toolkit(data: Path, path: Path) -> Path:
    """The corpus and outcomes of a folder as one CSV file in the toolkit's format."""
    prompts = {row["prompt_id"]: row["prompt"] for row in pq.read_table(data / "corpus.parquet").to_pylist()}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "model", "isCorrect", "output_tokens"])
        for row in pq.read_table(data / "outcomes.parquet").to_pylist():
            writer.writerow([prompts[row["prompt_id"]], row["target"], bool(row["correct"]), row["output_tokens"]])
    return path


def test_from_a_toolkits_csv_to_a_router(command: Command, small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    source, data, store, out = (tmp_path / name for name in ("answers.csv", "data", "activations", "router"))
    ingested = command("ingest", "toolkit", str(write_toolkit(small_data, source)), out=data)
    assert (ingested.status, ingested.err) == (0, "")
    assert "0 rows quarantined" in ingested.out
    extracted = command("extract", corpus=data / "corpus", encoder=tiny_model, out=store)
    assert extracted.status == 0, extracted.err
    graded = {"activations": store, "outcomes": data / "outcomes", "pool": small_data / "pool.toml"}
    trained = command("train", **graded, out=out, seeds=4, keep=2)
    assert trained.status == 0, trained.err
    prediction = Router.load(str(out)).predict(["what is one plus two", "name a river in that old town"])
    p_big, p_small = prediction.p_correct.T
    assert (p_big > 0.6).all()
    assert p_small[0] > p_small[1] + 0.2
