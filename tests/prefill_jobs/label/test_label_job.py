from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from prefill_jobs.extract.extract_job import extract
from prefill_jobs.label.label_job import LabelManifest, label
from prefill_jobs.options import ExtractConfig, LabelConfig
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.baselines.blind import Always
from prefill_router.common.errors import UserError
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.router.artifact import Router
from tiny import CHAT_TEMPLATE, save_tiny_model

pytestmark = pytest.mark.usefixtures("in_process")

RIVER = [{"role": "user", "content": "name a river"}]


def write_log(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A query log of prompts and conversations without ids."""
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
    with pytest.raises(UserError, match="already has decisions"):
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
    assert cheapest < spent <= (cheapest + dearest) / 2 + dearest / 6  # twelve lines allow no better fit
    before = decisions(log)
    with pytest.raises(UserError, match="the log costs at least"):
        labelled(router, log, budget_usd=cheapest / 2, overwrite=True)
    assert decisions(log) == before


def test_a_partitioned_log_of_requests_keeps_its_folders_and_is_reported_by_column(
    plots: None, router: str, tmp_path: Path
) -> None:
    log = tmp_path / "requests"
    cached, reasoning = {"cached_tokens": 4}, {"reasoning_tokens": 60}
    usage = {"prompt_tokens": 10, "completion_tokens": 40, "total_tokens": 110, "prompt_tokens_details": cached}
    usage["completion_tokens_details"] = reasoning
    for day in (1, 2):
        rows = [
            {
                "request": {"model": "big", "messages": [{"role": "user", "content": f"what is {day} plus {i % 7}"}]},
                "response": {"usage": usage},
                "cost_usd": 0.25 if i == 0 else None,
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
    assert segments["", ""]["used_cost_usd"] == pytest.approx(2 * 0.25 + 38 * big.cost(10, 100))
    quarantined = pq.ParquetFile(tmp_path / "out" / "quarantine" / "rows.parquet").read().to_pylist()
    assert [row["row"] for row in quarantined] == [20, 20]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The log records the target and the cost or answer length of" in page
    assert "By meta.team" in page
    assert page.count("<svg") == 2  # cost and expected accuracy, for desktop and for phone

    labelled(router, log, by="meta.team", time="at", partition_by="meta.team,day", overwrite=True)
    found = duckdb.sql(
        f"select \"meta.team\", count(*) from read_parquet('{tmp_path}/out/decisions/**/*.parquet', "
        "hive_partitioning = true) group by 1 order by 1"
    ).fetchall()
    assert found == [("blue", 14), ("red", 26)]


def by_duckdb(folder: Path) -> list[dict[str, Any]]:
    table = duckdb.sql(f"select * from read_parquet('{folder}/**/*.parquet', hive_partitioning = true)")
    return table.to_arrow_table().to_pylist()


def by_pyarrow(folder: Path) -> list[dict[str, Any]]:
    return ds.dataset(folder, partitioning="hive").to_table().to_pylist()


def by_pandas(folder: Path) -> list[dict[str, Any]]:
    frame = pd.read_parquet(folder)
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


@pytest.mark.parametrize("read", [by_duckdb, by_pyarrow, by_pandas])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"by": "country", "time": "at"},
        {"by": "team,day,country", "partition_by": "team,country"},
        {"by": "country", "time": "at", "partition_by": "day,country"},
    ],
)
def test_others_read_decisions_back_whatever_their_folders_are_called(
    router: str, tmp_path: Path, read: Callable[[Path], list[dict[str, Any]]], options: dict[str, Any]
) -> None:
    for day in (20261101, 20261102):
        for target in ("big", "7"):
            rows = [{"prompt": f"what is {i}", "at": "2026-11-01T10:00:00Z", "team": "a/b"} for i in range(3)]
            write_log(tmp_path / "log" / f"day={day}" / f"target={target}" / "country=c%C3%B4te" / "a.jsonl", rows)
    labelled(router, tmp_path / "log", **options)
    rows = read(tmp_path / "out" / "decisions")
    assert len(rows) == 12
    assert {row["target"] for row in rows} <= {"big", "small"}
    assert {(str(row["file"]), int(row["row"])) for row in rows} == {
        (f"day={day}/target={target}/country=c%C3%B4te/a.jsonl", i)
        for day in (20261101, 20261102)
        for target in ("big", "7")
        for i in range(3)
    }
    for row in rows:
        day = {"day,country": "2026-11-01"}.get(options.get("partition_by", ""), row["file"][4:12])
        if "partition_by" not in options or "day" in options["by"] or "day" in options["partition_by"]:
            assert str(row["day"])[:10] == day
        if options:
            assert row["country"] in ("côte", "c%C3%B4te")
        if "team" in options.get("by", ""):
            assert row["team"] == "a/b"


def test_a_column_that_no_line_has_is_told(router: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(router, log, by="team", time="at")
    said = [line for line in capsys.readouterr().err.splitlines() if "no line has a value" in line]
    remedy = f"check --by and --time for {log}"
    assert said == [f"label: no line has a value in column {name}: {remedy}" for name in ("day", "team")]


def test_an_incremental_run_decides_new_files_alone(router: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_log(log / "a.jsonl", [*({"prompt": f"what is one plus {i}"} for i in range(6)), {"prompt": ""}])
    assert labelled(router, log, incremental=True).computed == 6
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "decisions").iterdir()}
    assert labelled(router, log, incremental=True).computed == 6  # the previous manifest, as no file is new
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
    with pytest.raises(UserError, match=r"a\.jsonl: changed since it was decided"):
        labelled(router, log, incremental=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_usd": 1.0, "tolerance": 0.1}, "a budget replaces the tolerance"),
        ({"incremental": True, "limit": 3}, "incremental runs decide whole files"),
        ({"targets": "huge"}, 'target "huge" is not in the pool'),
        ({"partition_by": "day"}, "partition_by = day: .* give --time"),
        ({"partition_by": "team"}, "partition_by = team, must be day or a column of --by"),
        ({"max_bad_fraction": 0.0}, r"1 of 13 rows are invalid.*log\.jsonl: row 13: prompt = 7"),
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


# --- activations -------------------------------------------------------------------------------------------------


@pytest.fixture
def picky(router: str, tmp_path: Path) -> str:
    """The router with an encoder whose template refuses the prompt "no town"."""
    refusing = "{% if 'no town' in messages[0]['content'] %}{{ raise_exception('no towns') }}{% endif %}"
    encoder = PrefillEncoder.load(str(save_tiny_model(tmp_path / "model", chat_template=refusing + CHAT_TEMPLATE)))
    replace(Router.load(router), encoders={"": encoder.identity}).save(str(tmp_path / "picky"))
    return str(tmp_path / "picky")


def append(log: Path, *rows: Any) -> None:
    log.write_text(log.read_text() + "".join(json.dumps(row) + "\n" for row in rows))


def as_corpus(router: str, log: Path, out: Path, **options: Any) -> ExtractConfig:
    """The extraction of the layers and poolings that a router reads."""
    loaded = Router.load(router)
    fields: dict[str, Any] = {
        "corpus": str(log),
        "encoder": loaded.encoders[""].spec.model,
        "layers": ",".join(sorted({str(column.layer) for column in loaded.columns})),
        "pooling": ",".join(sorted({column.pooling for column in loaded.columns})),
        "out": str(out),
    }
    return ExtractConfig(**{**fields, **options})


def test_activations_are_kept_as_extract_keeps_them_and_decide_the_same(picky: str, log: Path, tmp_path: Path) -> None:
    """The log has a repeated prompt, one that the encoder truncates, one that it refuses, and an invalid line."""
    append(log, {"prompt": "two " * 300}, {"prompt": "no town"}, {"prompt": 7}, {"prompt": "no town"})
    without = labelled(picky, log, shard_rows=5)
    expected = decisions(log)
    assert (without.lines, without.computed, without.quarantined) == (13, 12, 3)
    assert expected[12]["input_tokens"] > 300
    shutil.rmtree(tmp_path / "out")

    kept = labelled(picky, log, shard_rows=5, activations=str(tmp_path / "kept"))
    assert decisions(log) == expected
    assert kept == without
    extract(as_corpus(picky, log, tmp_path / "extracted", shard_rows=5))
    ours, theirs = (ActivationStore.open(str(tmp_path / name)) for name in ("kept", "extracted"))
    assert set(ours.columns) == set(Router.load(picky).columns)
    assert ours.manifest.encoder == theirs.manifest.encoder
    assert ours.num_shards == theirs.num_shards
    for shard in range(ours.num_shards):
        (ids, values), (other_ids, others) = (store.read(shard, ours.columns) for store in (ours, theirs))
        assert ids == other_ids
        for name in values:
            np.testing.assert_array_equal(values[name], others[name])
    assert ours.manifest.quarantine == theirs.manifest.quarantine

    shutil.rmtree(tmp_path / "out")  # only the store has the prompts now
    again = labelled(picky, log, shard_rows=5, activations=str(tmp_path / "kept"))
    assert again == kept.model_copy(update={"computed": 0})
    assert decisions(log) == expected


def test_a_store_that_lies_there_goes_on(router: str, log: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    extract(as_corpus(router, log, store, layers="all", pooling="last,mean", limit=4))
    columns = ActivationStore.open(str(store)).columns
    assert labelled(router, log).computed == 11
    expected = decisions(log)
    assert labelled(router, log, activations=str(store), overwrite=True).computed == 7  # prompts that the store lacked
    grown = ActivationStore.open(str(store))
    assert (grown.columns, grown.manifest.rows) == (columns, 12)
    assert labelled(router, log, activations=str(store), overwrite=True).computed == 0
    assert decisions(log) == expected
    assert extract(as_corpus(router, log, store))[str(store)].work.prompts == 0


def test_an_incremental_run_keeps_the_activations_of_the_whole_log(router: str, tmp_path: Path) -> None:
    log, store = tmp_path / "log", str(tmp_path / "store")
    rows = [{"prompt": f"what is one plus {i}"} for i in range(9)]
    write_log(log / "a.jsonl", [*rows[:6], {"prompt_id": "x", "messages": RIVER}])
    assert labelled(router, log, incremental=True, activations=store).computed == 7
    write_log(log / "b.jsonl", [*rows[4:], {"prompt_id": "x", "prompt": "name a town"}])  # the id of another prompt
    manifest = labelled(router, log, incremental=True, activations=store)
    assert (manifest.lines, manifest.computed) == (13, 4)
    assert ActivationStore.open(store).manifest.rows == 12
    quarantined = pq.read_table(f"{store}/quarantine/rows.parquet")["reason"].to_pylist()
    assert quarantined == ['prompt_id "x" occurs more than once: ids must be unique']
    Path(store, "manifest.json").unlink()
    assert (
        labelled(router, log, incremental=True, activations=store) == manifest
    )  # the previous manifest, as no file is new
    assert ActivationStore.open(store).manifest.rows == 12


def test_activations_have_no_place_among_those_of_another_encoder(router: str, log: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    extract(as_corpus(router, log, store, max_tokens=8, limit=3))
    with pytest.raises(UserError, match="holds activations of another encoder"):
        labelled(router, log, activations=str(store))
    assert ActivationStore.open(str(store)).manifest.rows == 3
    with pytest.raises(UserError, match="out is the --out folder: choose another folder"):
        labelled(router, log, activations=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_baseline_has_no_activations(router: str, log: Path, tmp_path: Path) -> None:
    pool, lengths = Router.load(router).pool, np.array([10, 20], np.float32)
    always = Always(0).fit(np.zeros((1, 1)), np.zeros((1, 2)))
    BaselineRouter("always", always, pool, lengths, 0.0, "package:none", "none").save(str(tmp_path / "baseline"))
    with pytest.raises(UserError, match=r"baseline, which reads no activations: omit --activations"):
        labelled(str(tmp_path / "baseline"), log, activations=str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_line_whose_model_is_no_name_was_sent_to_no_known_target(router: str, tmp_path: Path) -> None:
    """Logs hold what callers sent."""
    request = {"messages": [{"role": "user", "content": "what is one plus two"}]}
    models: list[Any] = ["big", {"name": "big"}, ["big"], None]
    rows = [{"request": {**request, "model": model}, "cost_usd": 0.25} for model in models]
    write_log(tmp_path / "log.jsonl.gz", rows)
    assert labelled(router, tmp_path / "log.jsonl.gz").lines == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (everything,) = (s["sums"] for s in report["segments"] if s["column"] == "")
    assert everything["used"] == [1, 0]
