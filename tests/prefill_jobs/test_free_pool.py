"""A pool whose targets cost nothing, such as models of one's own: every step works, and no figure is 0 / 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from here import without_ray
from prefill_jobs.evaluate.evaluate_job import evaluate
from prefill_jobs.label.label_job import label
from prefill_jobs.options import EvaluateConfig, LabelConfig, TrainConfig
from prefill_jobs.train.train_job import train
from prefill_router.reports.router_card import card
from prefill_router.router.artifact import Router

pytestmark = [pytest.mark.usefixtures("in_process"), pytest.mark.slow("trains a router")]

FREE = "".join(f'[[pool]]\nname = "{name}"\ninput_price = 0\noutput_price = 0\n' for name in ("big", "small"))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in numbers(part)]
    return [value] if isinstance(value, float) else []


def test_a_pool_that_costs_nothing_is_trained_judged_and_labelled(
    activations: str, small_data: Path, tmp_path: Path
) -> None:
    pool = tmp_path / "free.toml"
    pool.write_text(FREE)
    given = {"activations": activations, "outcomes": str(small_data / "outcomes.parquet")}
    router, report = str(tmp_path / "router"), tmp_path / "report"
    with without_ray():
        train(TrainConfig(**given, pool=str(pool), out=router, seeds=4, keep=2))
        evaluate(EvaluateConfig(**given, router=router, out=str(report), draws=20))
    loaded = Router.load(router)
    rows, targets = card(loaded)
    assert dict(rows)["cost"] == "$0.00 per 1,000 prompts (best single target $0.00)"
    assert [row[1:3] for row in targets[1:]] == [("$0.00", "$0.00")] * 2
    decision = loaded.route("what is one plus two")
    assert decision.target == max(decision.p_correct, key=decision.p_correct.__getitem__)  # the cheapest: all are
    assert set(decision.expected_cost_usd.values()) == {0.0}
    found = json.loads((report / "report.json").read_text())
    assert found["router"]["cost"] == found["router"]["p_auccc"] == 0.0
    assert found["router"]["cost_saving"] is None  # of nothing
    assert all(math.isfinite(number) for number in numbers(found))

    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"prompt": f"what is one plus {i}"}) + "\n" for i in range(10)))
    manifest = label(LabelConfig(router=router, log=str(log), out=str(tmp_path / "labels"), budget_usd=1.0))
    assert sum(manifest.decisions.values()) == 10
    assert "nan" not in (tmp_path / "labels" / "report.json").read_text().lower()
    for page in (report, tmp_path / "labels"):
        text = (page / "report.html").read_text().lower()
        assert [word for word in ("$nan", "nan%", "inf%", ">nan") if word in text] == []
