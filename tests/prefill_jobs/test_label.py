from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest

from prefill_jobs.label import label
from prefill_router.config import LabelConfig
from prefill_router.errors import UserError
from prefill_router.router import Router


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A query log of bare prompts and conversations, without ids."""
    rows = [{"prompt": f"what is one plus {i}"} for i in range(10)]
    rows += [{"messages": [{"role": "user", "content": "name a river"}]}, {"prompt": "what is one plus 3"}]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_prompt_gets_the_decision_that_the_router_makes(router: str, log: Path, tmp_path: Path) -> None:
    manifest = label(LabelConfig(router=router, log=str(log), out=str(tmp_path / "out"), shard_rows=5))
    assert manifest["rows"] == 12
    rows = duckdb.sql(f"select * from '{tmp_path}/out/*.parquet'").fetchall()
    columns = duckdb.sql(f"select * from '{tmp_path}/out/*.parquet'").columns
    assert columns == [
        "prompt_id",
        "target",
        "p_correct",
        "expected_output_tokens",
        "expected_cost_usd",
        "router_version",
    ]
    loaded = Router.load(router)
    first = loaded.route("what is one plus 0")
    assert rows[0][1] == first.target
    assert rows[0][2]["small"] == pytest.approx(first.p_correct["small"], abs=0.02)
    assert {row[5] for row in rows} == {loaded.version}
    assert rows[3][0] == rows[11][0]  # the same content, the same id


def test_constraints_hold_and_a_prompt_that_no_target_fits_has_none(router: str, log: Path, tmp_path: Path) -> None:
    config = LabelConfig(router=router, log=str(log), out=str(tmp_path / "out"), max_cost=0.0, limit=4)
    assert label(config)["decisions"] == {"none": 4}
    assert duckdb.sql(f"select distinct target from '{tmp_path}/out/*.parquet'").fetchall() == [(None,)]


def test_a_log_with_a_bad_row_writes_nothing(router: str, log: Path, tmp_path: Path) -> None:
    log.write_text(log.read_text() + '{"prompt": 7}\n')
    with pytest.raises(UserError, match=r"log\.jsonl: row 13: prompt = 7"):
        label(LabelConfig(router=router, log=str(log), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
