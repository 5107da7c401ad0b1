from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prefill_jobs.graded import GradedStore
from prefill_jobs.probe import load_probes, run_probe
from prefill_router.config import ProbeConfig
from prefill_router.errors import UserError
from prefill_router.features import ActivationStore
from prefill_router.outcomes import load_outcomes
from prefill_router.probe import effective_dimensionality, fisher_separability


def config(activations: str, small_data: Path, out: Path) -> ProbeConfig:
    return ProbeConfig(
        activations=activations,
        outcomes=str(small_data / "outcomes.parquet"),
        pool=str(small_data / "pool.toml"),
        out=str(out),
    )


def test_every_column_and_target_agrees_with_the_whole_in_memory(
    activations: str, small_data: Path, tmp_path: Path
) -> None:
    probes = run_probe(config(activations, small_data, tmp_path))
    store = ActivationStore.open(activations)
    correct = load_outcomes(str(small_data / "outcomes.parquet"), ["big", "small"]).align(store.prompt_ids()).correct
    assert len(probes) == 5 * 2 * 2
    for probe in probes:
        parts = [store.read(shard, [probe.column])[1] for shard in range(store.num_shards)]
        x = np.concatenate([part[probe.column.name] for part in parts])
        y = correct[:, ["big", "small"].index(probe.target)]
        assert probe.fisher_j == pytest.approx(fisher_separability(x, y), rel=1e-6)
        assert probe.d_eff == pytest.approx(effective_dimensionality(x[~np.isnan(y)]), rel=1e-6)
        assert probe.num_prompts == (~np.isnan(y)).sum()


def test_table_choice_and_plot_are_written(activations: str, small_data: Path, tmp_path: Path) -> None:
    probes = run_probe(config(activations, small_data, tmp_path))
    assert load_probes(str(tmp_path)) == probes
    chosen = json.loads((tmp_path / "probe.json").read_text())["columns"]
    best = max((p for p in probes if p.target == "small"), key=lambda p: p.fisher_j_corrected)
    assert chosen["small"] == best.column.name
    assert (tmp_path / "probe.svg").read_text().startswith("<svg")


def test_an_outcome_of_an_unknown_prompt_is_an_error_unless_ignored(
    activations: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    outcomes = pq.read_table(small_data / "outcomes.parquet")
    stray = pa.table({"prompt_id": ["nobody"], "target": ["big"], "correct": [1.0], "output_tokens": [5]})
    pq.write_table(pa.concat_tables([outcomes, stray.cast(outcomes.schema)]), tmp_path / "outcomes.parquet")
    arguments = (activations, str(tmp_path / "outcomes.parquet"), str(small_data / "pool.toml"))
    with pytest.raises(UserError, match='prompt_id "nobody" has outcomes but no activations'):
        GradedStore.open(*arguments, ignore_unknown=False)
    assert len(GradedStore.open(*arguments, ignore_unknown=True).graded_ids) == 240
    assert "1 graded prompts have no activations and are left out" in capsys.readouterr().err
