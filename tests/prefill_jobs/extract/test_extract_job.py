from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from command import Command
from corpora import write_corpus, write_jsonl
from prefill_jobs.extract.extract_job import extract, parse_layers, parse_pooling
from prefill_jobs.extract.extract_summary import ExtractSummary
from prefill_jobs.options import ExtractConfig
from prefill_jobs.runtime import progress, ray_tasks
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.errors import UserError
from prefill_router.corpus.plan import plan
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.storage.lease import Lease
from tiny import random_prompts

pytestmark = pytest.mark.usefixtures("in_process")


def test_the_store_holds_what_the_encoder_returns(activations: str, small_data: Path, tiny_model: Path) -> None:
    store = ActivationStore.open(activations)
    corpus = pq.read_table(small_data / "corpus.parquet")
    encoder = PrefillEncoder.load(str(tiny_model))
    assert store.manifest.encoder == encoder.identity
    assert store.manifest.rows == len(corpus)
    assert store.prompt_ids().to_pylist() == corpus["prompt_id"].to_pylist()
    assert store.num_shards == 5
    for shard in range(store.num_shards):
        expected = encoder.encode(corpus["prompt"].slice(50 * shard, 50).to_pylist())
        _, stored = store.read(shard, store.columns)
        assert stored.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(stored[name], expected[name], atol=0.04)  # bfloat16, values up to 8


def run(corpus: object, encoder: Path, out: object, **options: Any) -> ExtractSummary:
    fields = {"layers": "1,3", "shard_rows": 20, **options}
    return extract(ExtractConfig(corpus=str(corpus), encoder=str(encoder), out=str(out), **fields))[str(out)]


def contents(out: object) -> dict[str, dict[str, NDArray[Any]]]:
    """The values in a store by prompt_id."""
    store = ActivationStore.open(str(out))
    rows: dict[str, dict[str, NDArray[Any]]] = {}
    for shard in range(store.num_shards):
        ids, encoded = store.read(shard, store.columns)
        for i, prompt_id in enumerate(ids.to_pylist()):
            rows[prompt_id] = {name: values[i] for name, values in encoded.items()}
    return rows


def assert_equal_rows(a: dict[str, dict[str, NDArray[Any]]], b: dict[str, dict[str, NDArray[Any]]]) -> None:
    assert a.keys() == b.keys()
    for prompt_id, row in a.items():
        for name, values in row.items():
            np.testing.assert_array_equal(values, b[prompt_id][name], err_msg=f"{prompt_id} {name}")


def files_at(out: object) -> dict[str, int]:
    """The modification time of every file of an output, except the lease and the manifest."""
    paths = [path for path in Path(str(out)).rglob("*") if path.is_file() and "_lease" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in paths if path.name not in ("manifest.json", "summary.json")}


def test_only_the_layers_poolings_and_prompts_asked_for(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus, options = small_data / "corpus.parquet", {"layers": "3, 1", "pooling": "mean", "limit": 7, "max_tokens": 6}
    manifest = run(corpus, tiny_model, tmp_path / "out", **options).manifest
    assert manifest.columns == ["mean_001", "mean_003"]
    assert manifest.rows == 7
    assert manifest.is_sample
    assert manifest.encoder.spec.max_tokens == 6
    assert sum(shard.num_truncated for shard in manifest.shards) == 7


def test_a_failed_extraction_leaves_no_manifest(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layer 9 is out of range"):
        run(small_data / "corpus.parquet", tiny_model, tmp_path / "out", layers="9")
    with pytest.raises(UserError, match="no finished extraction"):
        ActivationStore.open(str(tmp_path / "out"))


def test_the_summary_is_the_last_line_and_lies_beside_the_manifest(
    command: Command, small_data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SHORT_S", 0.0)
    corpus, out = small_data / "corpus.parquet", tmp_path / "out"
    result = command("extract", corpus=corpus, encoder=tiny_model, layers="1,3", shard_rows=100, out=out)
    assert result.status == 0, result.err
    summary = json.loads(result.out.splitlines()[-1])
    assert summary == storage.read_json(str(out / "summary.json"))
    prompts = pq.read_table(corpus)["prompt"].to_pylist()
    tokens = int(PrefillEncoder.load(str(tiny_model)).tokenize(prompts).num_tokens.sum())
    counts = {name: summary[name] for name in ("prompts", "computed", "reused", "quarantined", "tokens", "shards")}
    expected = {"prompts": 240, "computed": 240, "reused": 0, "quarantined": 0, "tokens": tokens, "shards": 3}
    assert counts == expected
    assert summary["bytes"] == sum(path.stat().st_size for path in out.glob("part-*.parquet"))
    assert summary["flops"] > 0
    assert 0 < summary["mfu"] < 1
    assert "240/240 prompts" in result.err


# --- each shard once ---------------------------------------------------------------------------------------------


def test_a_finished_extraction_is_not_done_again(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus, out = small_data / "corpus.parquet", tmp_path / "out"
    run(corpus, tiny_model, out, limit=50)
    before = files_at(out)
    summary = run(corpus, tiny_model, out, limit=50).to_dict()
    assert (summary["computed"], summary["reused"], summary["prompts"]) == (0, 50, 50)
    assert files_at(out) == before


def test_what_was_committed_before_a_job_died_is_kept(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A job that died left no manifest, and its last shard has a file but no record."""
    corpus, out = small_data / "corpus.parquet", tmp_path / "out"
    shards = run(corpus, tiny_model, out, limit=60).manifest.shards
    expected = contents(out)
    (out / "manifest.json").unlink()
    (out / "commits" / shards[2].file.name.removeprefix("part-").replace(".parquet", ".json")).unlink()
    (out / shards[1].file.name).unlink()
    (out / "commits" / shards[1].file.name.removeprefix("part-").replace(".parquet", ".json")).unlink()
    summary = run(corpus, tiny_model, out, limit=60)
    assert summary.to_dict()["reused"] == 20
    assert summary.manifest.shards == shards
    assert_equal_rows(contents(out), expected)


@pytest.mark.parametrize("segment_records", [1, 4096])
def test_a_corpus_that_grew_costs_what_is_new(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_records: int
) -> None:
    """Adds rows at a file's end, and a file that sorts before the others; with records compacted or in single files."""
    monkeypatch.setattr("prefill_router.activations.commit_log.SEGMENT_RECORDS", segment_records)
    prompts = random_prompts(70, seed=7)
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    write_corpus(corpus / "b.jsonl", prompts[:30])
    run(corpus, tiny_model, out)
    before = contents(out)
    write_corpus(corpus / "b.jsonl", prompts[:45])
    write_corpus(corpus / "a.jsonl", prompts[45:], prefix="a")
    summary = run(corpus, tiny_model, out).to_dict()
    assert (summary["computed"], summary["prompts"]) == (40, 70)
    assert summary["reused"] + summary["copied"] == 30
    after = contents(out)
    assert_equal_rows({prompt_id: after[prompt_id] for prompt_id in before}, before)
    assert len(list(out.glob("part-*.parquet"))) == len(ActivationStore.open(str(out)).manifest.shards)


def test_added_layers_leave_the_others_as_they_are(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus, out = small_data / "corpus.parquet", tmp_path / "out"
    run(corpus, tiny_model, out, limit=50, layers="3", pooling="mean")
    before = contents(out)
    summary = run(corpus, tiny_model, out, limit=50, layers="1", pooling="last")
    assert summary.manifest.columns == ["last_001", "mean_003"]
    half = summary.work.flops  # only block 1 runs
    whole = run(corpus, tiny_model, tmp_path / "whole", limit=50, layers="3", pooling="mean").work.flops
    assert half == pytest.approx(whole / 3)
    after = contents(out)
    for prompt_id, row in before.items():
        np.testing.assert_array_equal(after[prompt_id]["mean_003"], row["mean_003"])
    again = run(corpus, tiny_model, out, limit=50, layers="3", pooling="mean")
    assert again.manifest.columns == ["last_001", "mean_003"]
    assert again.to_dict()["computed"] == 0


def test_a_store_never_loses_rows(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus, out = small_data / "corpus.parquet", tmp_path / "out"
    run(corpus, tiny_model, out, limit=30)
    with pytest.raises(
        UserError, match=r"10 rows of shard part-\w+\.parquet, .* are missing or changed in this corpus"
    ):
        run(corpus, tiny_model, out, limit=20)
    assert ActivationStore.open(str(out)).manifest.rows == 30
    assert run(corpus, tiny_model, out, limit=20, overwrite=True).manifest.rows == 20


def test_another_encoder_is_refused(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus, out = small_data / "corpus.parquet", tmp_path / "out"
    run(corpus, tiny_model, out, limit=20)
    with pytest.raises(UserError, match="holds activations of another encoder"):
        run(corpus, tiny_model, out, limit=40, max_tokens=5)


def test_a_second_writer_is_refused(command: Command, small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    with Lease.acquire(str(tmp_path / "out"), "extract"):
        result = command("extract", corpus=small_data / "corpus.parquet", encoder=tiny_model, out=tmp_path / "out")
    assert result.status == 1
    assert "another extract is writing here" in result.err
    assert result.err.count("\n") == 1


# --- repeats -----------------------------------------------------------------------------------------------------


def test_repeated_prompts_without_ids_are_kept_and_said(command: Command, tiny_model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("prompt\none two\nthree four\none two\n")
    result = command("extract", corpus=corpus, encoder=tiny_model, layers="1", out=tmp_path / "out")
    assert result.status == 0
    assert "1 prompts repeat an earlier one" in result.err
    first, second, third = ActivationStore.open(str(tmp_path / "out")).prompt_ids().to_pylist()
    assert first == third != second


def test_a_repeated_prompt_is_computed_once_and_written_for_each_id(tiny_model: Path, tmp_path: Path) -> None:
    prompts = random_prompts(30, seed=3)
    corpus = write_corpus(tmp_path / "corpus.jsonl", [*prompts, *prompts[::-1], prompts[4]])
    summary = run(corpus, tiny_model, tmp_path / "out").to_dict()
    assert (summary["computed"], summary["copied"], summary["prompts"]) == (30, 31, 61)
    rows = contents(tmp_path / "out")
    for i in range(30):
        for name, values in rows[f"p{i}"].items():
            np.testing.assert_array_equal(rows[f"p{59 - i}"][name], values)
    assert run(corpus, tiny_model, tmp_path / "out").to_dict()["reused"] == 61


# --- invalid rows ------------------------------------------------------------------------------------------------


def test_bad_rows_go_to_the_quarantine_with_their_reason(tiny_model: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    good = [json.dumps({"prompt_id": f"p{i}", "prompt": p}).encode() for i, p in enumerate(random_prompts(9))]
    bad = {
        "null": b'{"prompt_id": "null", "prompt": null}',
        "empty": b'{"prompt_id": "empty", "prompt": ""}',
        "number": b'{"prompt_id": "number", "prompt": 5}',
        "bytes": b'{"prompt_id": "bytes", "prompt": "\xff\xfe"}',
        "large": b'{"prompt_id": "large", "prompt": "' + b"one " * 500 + b'"}',
        "role": b'{"prompt_id": "role", "messages": [{"role": "wizard", "content": "one"}]}',
    }
    corpus.write_bytes(b"\n".join([*good[:4], *bad.values(), *good[4:]]) + b"\n")
    summary = run(corpus, tiny_model, out, max_prompt_bytes=1000)
    assert summary.to_dict()["quarantined"] == len(bad)
    assert contents(out).keys() == {f"p{i}" for i in range(9)}
    rows = duckdb.sql(f"select file, row, prompt_id, reason from '{out}/quarantine/*.parquet' order by row").fetchall()
    assert [(file, row, prompt_id) for file, row, prompt_id, _ in rows] == [
        (str(corpus), 4 + i, prompt_id) for i, prompt_id in enumerate(bad)
    ]
    assert all(reason for *_, reason in rows)
    assert summary.manifest.quarantine is not None
    assert summary.manifest.quarantine.rows == len(bad)


def test_messages_that_the_template_refuses_are_quarantined_with_their_repeats(tmp_path: Path) -> None:
    from tiny import CHAT_TEMPLATE, save_tiny_model

    refusing = "{% if 'river' in messages[0]['content'] %}{{ raise_exception('no rivers') }}{% endif %}"
    encoder = save_tiny_model(tmp_path / "model", chat_template=refusing + CHAT_TEMPLATE)
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["one two", "big river", "three", "four five", "big river"])
    summary = run(corpus, encoder, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {"p0", "p2", "p3"}
    query = f"select prompt_id, reason from '{tmp_path}/out/quarantine/*.parquet' order by 1"
    rows = duckdb.sql(query).fetchall()
    assert [prompt_id for prompt_id, _ in rows] == ["p1", "p4"]
    assert all("no rivers" in reason for _, reason in rows)
    assert summary.to_dict()["quarantined"] == 2


def test_a_corpus_of_rubbish_stops_the_job(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["one", "", "", "two"])
    with pytest.raises(UserError, match=r"2 of 4 rows are invalid, more than --max-bad-fraction 0\.4 allows: .*row 2"):
        run(corpus, tiny_model, tmp_path / "out", max_bad_fraction=0.4)
    assert run(corpus, tiny_model, tmp_path / "out").manifest.rows == 2


@pytest.mark.parametrize("text", ["1,x", "", "1;2"])
def test_layers_that_are_no_list_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["max", "last,first", ""])
def test_poolings_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be"):
        parse_pooling(text)


def test_a_corpus_is_planned_by_a_cluster_as_it_is_here(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(5):  # repeated and invalid prompts; given, duplicate and missing ids
        prompts = rng.choice(["a", "b", "c", "d", "e", "f", " "], 9)
        ids = rng.integers(0, 200, 9)
        rows = (
            {"prompt": str(p)} | ({"prompt_id": f"p{n}"} if i % 2 else {}) for p, n in zip(prompts, ids, strict=True)
        )
        write_jsonl(tmp_path / f"{i}.jsonl", *rows)
    here, there = plan(str(tmp_path), 2), plan(str(tmp_path), 2, spread=ray_tasks.spread)
    assert here.repeats
    assert here.bad
    assert (there.shards, there.repeats, there.bad) == (here.shards, here.repeats, here.bad)
    np.testing.assert_array_equal(there.keys, here.keys)
    np.testing.assert_array_equal(there.is_first, here.is_first)
