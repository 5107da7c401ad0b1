from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from prefill_jobs.label import LabelManifest, label
from prefill_router.config import LabelConfig
from prefill_router.errors import UserError
from prefill_router.router import Router

RIVER = [{"role": "user", "content": "name a river"}]


def write_log(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A query log of bare prompts and conversations, without ids."""
    rows: list[Any] = [{"prompt": f"what is one plus {i}"} for i in range(10)]
    return write_log(tmp_path / "log.jsonl", [*rows, {"messages": RIVER}, {"prompt": "what is one plus 3"}])


def labelled(router: str, log: Path, **options: Any) -> LabelManifest:
    return label(LabelConfig(router=router, log=str(log), out=str(log.parent / "out"), **options))


def decisions(log: Path) -> list[dict[str, Any]]:
    files = sorted((log.parent / "out" / "decisions").rglob("*.parquet"))
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted(rows, key=lambda row: (row["file"], row["row"]))


def test_every_line_gets_the_decision_that_the_router_makes(router: str, log: Path, tmp_path: Path) -> None:
    manifest = labelled(router, log, shard_rows=5)
    assert (manifest.lines, manifest.repeated, manifest.computed, manifest.quarantined) == (12, 1, 11, 0)
    rows = decisions(log)
    assert [(row["file"], row["row"]) for row in rows] == [("log.jsonl", i) for i in range(12)]
    loaded = Router.load(router)
    for row, prompt in zip(rows, [*(f"what is one plus {i}" for i in range(10)), RIVER], strict=False):
        alone = loaded.route(prompt)
        assert row["target"] == alone.target
        assert row["p_correct"] == pytest.approx(alone.p_correct, abs=1e-3)
        assert row["expected_cost_usd"] == pytest.approx(alone.expected_cost_usd, rel=0.02)
        assert (row["input_tokens"], row["router_version"]) == (alone.input_tokens, loaded.version)
    assert rows[3]["prompt_id"] == rows[11]["prompt_id"]  # the same content, the same id
    assert rows[3]["p_correct"] == rows[11]["p_correct"]
    assert duckdb.sql(f"select count(*) from '{tmp_path}/out/decisions/*.parquet'").fetchall() == [(12,)]


def test_what_was_estimated_is_chosen_from_again_and_not_read_again(router: str, log: Path) -> None:
    first = labelled(router, log)
    assert sum(first.decisions.values()) == 12
    with pytest.raises(UserError, match="already holds decisions"):
        labelled(router, log)
    nothing = labelled(router, log, max_cost=0.0, overwrite=True)
    assert (nothing.decisions, nothing.computed) == ({"none": 12}, 0)
    only = labelled(router, log, targets="small", overwrite=True)
    assert (only.decisions, only.computed) == ({"small": 12}, 0)


def test_a_budget_is_spent_and_not_exceeded(router: str, log: Path) -> None:
    labelled(router, log, tolerance=1.0)
    cheapest = sum(row["expected_cost_usd"]["small"] for row in decisions(log))
    dearest = sum(row["expected_cost_usd"]["big"] for row in decisions(log))
    labelled(router, log, budget_usd=(cheapest + dearest) / 2, overwrite=True)
    spent = sum(row["expected_cost_usd"][row["target"]] for row in decisions(log))
    assert cheapest < spent <= (cheapest + dearest) / 2 + dearest / 6  # twelve lines cannot come nearer
    before = decisions(log)
    with pytest.raises(UserError, match="the log costs at least"):
        labelled(router, log, budget_usd=cheapest / 2, overwrite=True)
    assert decisions(log) == before


def test_a_partitioned_log_of_requests_keeps_its_folders_and_is_reported_by_column(router: str, tmp_path: Path) -> None:
    log = tmp_path / "requests"
    for day in (1, 2):
        rows = [
            {
                "request": {"model": "big", "messages": [{"role": "user", "content": f"what is {day} plus {i % 7}"}]},
                "response": {"usage": {"prompt_tokens": 10, "completion_tokens": 100}},
                "at": f"2026-11-0{day}T10:00:00Z",
                "meta": {"team": "red" if i % 3 else "blue"},
            }
            for i in range(20)
        ]
        write_log(log / f"day={day}" / "a.jsonl.gz", [*rows, {"request": {}}])
    manifest = labelled(router, log, by="meta.team", time="at", shard_rows=8)
    assert (manifest.lines, manifest.computed, manifest.quarantined) == (40, 14, 2)
    folders = [file.name.rpartition("/")[0] for file in manifest.files]
    assert folders == ["day=1"] * 3 + ["day=2"] * 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    segments = {(s["column"], s["value"]): s["sums"] for s in report["segments"]}
    assert segments["day", "2026-11-01"]["lines"] == segments["day", "2026-11-02"]["lines"] == 20
    assert segments["meta.team", "blue"]["lines"] == 14
    assert segments["", ""]["used"] == [40, 0]
    big = Router.load(router).pool.targets[0]
    assert segments["", ""]["used_cost_usd"] == pytest.approx(40 * big.cost(10, 100))
    quarantined = pq.ParquetFile(tmp_path / "out" / "quarantine" / "rows.parquet").read().to_pylist()
    assert [row["row"] for row in quarantined] == [20, 20]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "which target answered" in page
    assert "By meta.team" in page

    labelled(router, log, by="meta.team", time="at", partition_by="meta.team,day", overwrite=True)
    found = duckdb.sql(
        f"select \"meta.team\", count(*) from read_parquet('{tmp_path}/out/decisions/**/*.parquet', "
        "hive_partitioning = true) group by 1 order by 1"
    ).fetchall()
    assert found == [("blue", 14), ("red", 26)]


def test_an_incremental_run_decides_new_files_alone(router: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_log(log / "a.jsonl", [*({"prompt": f"what is one plus {i}"} for i in range(6)), {"prompt": ""}])
    assert labelled(router, log, incremental=True).computed == 6
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "decisions").iterdir()}
    assert labelled(router, log, incremental=True).computed == 6  # the manifest of before: there was nothing new
    write_log(log / "b.jsonl", [*({"prompt": f"what is one plus {i}"} for i in range(4, 9)), {"prompt": 7}])
    manifest = labelled(router, log, incremental=True)
    assert (manifest.lines, manifest.computed, len(manifest.inputs), manifest.quarantined) == (11, 3, 2, 2)
    assert [(row["file"], row["row"]) for row in decisions(log)] == [
        *(("a.jsonl", i) for i in range(6)),
        *(("b.jsonl", i) for i in range(5)),
    ]
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["segments"][0]["sums"]["lines"] == 11
    with pytest.raises(UserError, match="decided with another tolerance"):
        labelled(router, log, incremental=True, tolerance=0.5)
    write_log(log / "a.jsonl", [{"prompt": "what is this"}])
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since it was decided"):
        labelled(router, log, incremental=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_usd": 1.0, "tolerance": 0.1}, "give one of them"),
        ({"incremental": True, "limit": 3}, "a file that is decided is decided whole"),
        ({"targets": "huge"}, 'target "huge" is not in the pool'),
        ({"partition_by": "day"}, "no --time names the column"),
        ({"partition_by": "team"}, "must be day, or one of the columns of --by"),
        ({"max_bad_fraction": 0.0}, r"1 of 13 rows are bad.*log\.jsonl: row 13: prompt = 7"),
    ],
)
def test_what_cannot_be_is_one_line(router: str, log: Path, options: dict[str, Any], message: str) -> None:
    log.write_text(log.read_text() + '{"prompt": 7}\n')
    with pytest.raises(UserError, match=message):
        labelled(router, log, **options)
    assert not (log.parent / "out" / "manifest.json").exists()


def test_bad_lines_are_quarantined(router: str, log: Path) -> None:
    log.write_text(log.read_text() + '{"prompt": 7}\n')
    assert (labelled(router, log).quarantined, len(decisions(log))) == (1, 12)
