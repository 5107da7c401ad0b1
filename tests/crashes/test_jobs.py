"""Whole jobs under crashes at any moment: a restart gives the same result, and does no work twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from corpora import write_jsonl
from crashes.enumeration import Machines, crash_everywhere
from crashes.jobs import Collecting, Extracting, Labelling, Readings, Targets
from here import sequential
from prefill_jobs.runtime import cluster
from prefill_router.activations import activation_store, commit_log
from tiny import random_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = random_prompts(12, seed=5)


@pytest.fixture(autouse=True)
def _small(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs worker calls sequentially, with segments of two records and a manifest whose list is a separate object.

    Uses one thread, since more would only slow down tiny tensors.
    """
    monkeypatch.setattr(sequential, "is_set", True)
    monkeypatch.setattr(cluster, "threads_per_worker", lambda _workers: 1)
    monkeypatch.setattr(commit_log, "SEGMENT_RECORDS", 2)
    monkeypatch.setattr(activation_store, "MAX_LISTED", 2)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    return Readings(monkeypatch)


def lines(prompts: Sequence[str], prefix: str) -> list[dict[str, str]]:
    return [{"prompt_id": f"{prefix}{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]


def test_extract(machines: Machines, readings: Readings, tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", *lines([*PROMPTS[:8], PROMPTS[1], ""], "p"))
    options = {"corpus": str(corpus), "encoder": str(tiny_model), "layers": "1,3", "pooling": "last"}
    assert crash_everywhere(machines, partial(Extracting, readings, options)) > 30


def test_label_file_by_file(machines: Machines, readings: Readings, router: str, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    options = {"log": str(tmp_path / "log"), "router": router, "incremental": True}
    files = {
        f"{name}.jsonl": "".join(json.dumps(line) + "\n" for line in lines(prompts, name))
        for name, prompts in {"a": [*PROMPTS[:6], PROMPTS[1], ""], "b": PROMPTS[6:9]}.items()
    }
    assert crash_everywhere(machines, partial(Labelling, readings, options, files)) > 30


def test_label_within_a_budget_and_keep_activations(
    buckets: Machines, readings: Readings, router: str, tmp_path: Path
) -> None:
    (tmp_path / "log").mkdir()
    options = {"log": str(tmp_path / "log"), "router": router, "overwrite": True, "budget_usd": 0.0004}
    text = "".join(json.dumps(line) + "\n" for line in lines([*PROMPTS[:6], PROMPTS[1]], "p"))

    def labelling(out: str) -> Labelling:
        return Labelling(readings, {**options, "activations": f"{out}/activations"}, {"log.jsonl": text}, out)

    assert crash_everywhere(buckets, labelling) > 40


POOL = """
[[pool]]
name = "{name}"
input_price = 1.0
output_price = 4.0
upstream = {{ base_url = "http://localhost:1", concurrency = 2 }}
"""


def test_collect(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt_id": f"p{i}", "prompt": f"prompt {i}", "reference": f"big: prompt {i}"} for i in range(2)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", *rows)
    (tmp_path / "pool.toml").write_text("".join(POOL.format(name=name) for name in ("big", "small")))
    options = {
        "corpus": str(corpus),
        "pool": str(tmp_path / "pool.toml"),
        "grader": "exact",
        "max_output_tokens": 100,
        "budget_usd": 0.01,
        "shard_rows": 1,
    }
    assert crash_everywhere(machines, partial(Collecting, Targets(monkeypatch), options)) > 40
