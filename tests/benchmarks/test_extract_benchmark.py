"""The benchmark runs, its last line holds what it promises, and outputs that differ are an error."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny import random_prompts


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # as when it is run as a script
    module = importlib.import_module("extract")
    monkeypatch.setattr(module, "BATCH_SIZES", (2, 4))
    monkeypatch.setattr("race.measured_peak_flops", lambda *_: 1e12)  # takes longer than all else here
    return module


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> list[str]:
    corpus = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"prompt": random_prompts(10)}), corpus)
    small = ["--prompts", "8", "--chunk", "4", "--threads", "1", "--skip-ray"]
    return ["--device", "cpu", "--encoder", str(tiny_model), "--corpus", str(corpus), *small]


def test_the_last_line_holds_every_figure(
    benchmark: Any, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([*options, "--depth", "--prefix"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["hardware"]["threads"] == 1
    assert report["versions"].keys() >= {"python", "torch", "transformers"}
    assert report["peak_flops_per_s"].keys() == {"float32", "bfloat16"}
    assert (report["prompts"], report["chunks"]) == (8, 2)
    loops = report["loops"]["contenders"]
    assert list(loops) == ["peer", "sorted bf16", "engine"]
    for name, figures in loops.items():
        assert figures["tokens_per_s"] == pytest.approx(report["tokens"] / figures["seconds"])
        assert figures["times_as_fast_as"].keys() == loops.keys() - {name}
    assert report["depth"]["depth_ratio"] == 0.5
    assert report["prefix"]["common_tokens"] >= 200
    shared, apart = (report["prefix"]["contenders"][f"prefix {how}"] for how in ("shared", "apart"))
    assert shared["computed_tokens"] < apart["computed_tokens"] / 2
    compared = {row["contender"] for row in report["agreement"]}
    assert compared == {"sorted bf16", "engine", "half depth", "prefix shared"}


def test_outputs_that_differ_are_an_error(
    benchmark: Any, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = importlib.import_module("contenders").Engine
    run = engine.run

    def wrong(self: Any, prompts: list[str]) -> Any:
        encoded, work = run(self, prompts)
        return {name: values + (self.name == "half depth") for name, values in encoded.items()}, work

    monkeypatch.setattr(engine, "run", wrong)
    assert benchmark.main([*options, "--skip-loops", "--depth"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_a_column_that_is_no_number_does_not_agree(benchmark: Any) -> None:
    agreement = importlib.import_module("race").Agreement()
    contender = SimpleNamespace(name="a", dtype="float32")
    right = {"last_000": np.ones((2, 3)), "mean_000": np.ones((2, 3))}
    agreement.add(contender, {**right, "mean_000": np.full((2, 3), np.nan)}, right)
    assert [row["agrees"] for row in agreement.report()] == [True, False]
