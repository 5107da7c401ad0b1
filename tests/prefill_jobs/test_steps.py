"""The steps as functions: options by keyword, results as objects, and errors as on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpora import write
from prefill_jobs import steps
from prefill_router.common.errors import UserError
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


def test_a_step_returns_its_result(activations: str, small_data: Path, tmp_path: Path) -> None:
    summary = steps.ingest(format="table", source=str(write(tmp_path / "t.csv", "prompt,m\na,1\n")), out=str(tmp_path))
    assert summary.targets["m"].graded == 1
    given = {"activations": activations, "outcomes": str(small_data / "outcomes.parquet")}
    pool, out = str(small_data / "pool.toml"), str(tmp_path / "router")
    trained = steps.train(**given, pool=pool, out=out, seeds=2, keep=1, max_epochs=2)
    assert trained.version == Router.load(out).version
    assert steps.evaluate(**given, router=out, out=str(tmp_path / "report"), draws=20).router_version == trained.version


def test_an_unknown_option_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UserError, match='extract: unknown key "corpu", did you mean "corpus"'):
        steps.extract(corpu="c.jsonl", out="store")
