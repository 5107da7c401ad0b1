from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_jobs.extract.extract_job import extract
from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.options import ExtractConfig, ProbeConfig
from prefill_jobs.runtime import cluster
from prefill_jobs.train.probe_job import column_moments, load_probes, probe_store, run_probe
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.errors import UserError
from prefill_router.outcomes import load_outcomes
from prefill_router.probe.layer_scores import effective_dimensionality, fisher_separability

pytestmark = pytest.mark.usefixtures("in_process")


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
    correct = (
        load_outcomes(str(small_data / "outcomes.parquet"), ["big", "small"])
        .align(store.prompt_ids().to_pylist())
        .correct
    )
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
    summary = json.loads((tmp_path / "probe.json").read_text())
    chosen, encoder = summary["columns"], probes[0].encoder
    assert summary["encoders"] == {"big": encoder, "small": encoder}
    assert 1 <= len(summary["joint_columns"][encoder]) <= 3
    best = max((p for p in probes if p.target == "small"), key=lambda p: p.fisher_j_corrected)
    assert chosen["small"] == best.column.name
    assert (tmp_path / "probe.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("num_cpus", [1, 23, 1000])
def test_any_number_of_slices_gives_the_same(
    activations: str, small_data: Path, num_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (str(small_data / "outcomes.parquet"), str(small_data / "pool.toml"))
    graded = GradedStore.open(activations, *data, ignore_unknown=False)
    columns = graded.store.columns[3:5]
    one_by_one, whole = probe_store(graded), column_moments(graded, columns)
    monkeypatch.setattr(cluster, "num_cpus", lambda: num_cpus)
    for expected, got in zip(one_by_one, probe_store(graded), strict=True):
        assert (expected.column, expected.target, expected.num_prompts) == (got.column, got.target, got.num_prompts)
        for name in ("d_eff", "fisher_j", "fisher_j_corrected", "fisher_j_low", "fisher_j_high", "share_correct"):
            assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-9, nan_ok=True)
    for column, moments in column_moments(graded, columns).items():
        np.testing.assert_allclose(moments.scatter, whole[column].scatter, rtol=1e-9, atol=1e-9)


def test_every_target_takes_its_column_from_the_better_encoder(
    activations: str, small_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "another"
    other.symlink_to(tiny_model)
    corpus, second = str(small_data / "corpus.parquet"), str(tmp_path / "second")
    extract(ExtractConfig(corpus=corpus, encoder=str(other), layers="1", pooling="mean", out=second))
    probes = run_probe(config(f"{activations},{second}", small_data, tmp_path / "out"))
    assert [p.encoder for p in probes] == [str(tiny_model)] * 20 + [str(other)] * 2
    assert load_probes(str(tmp_path / "out")) == probes
    summary = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert set(summary["joint_columns"]) == {str(tiny_model), str(other)}
    for target, encoder in summary["encoders"].items():
        best = max((p for p in probes if p.target == target), key=lambda p: p.fisher_j_corrected)
        assert (best.encoder, best.column.name) == (encoder, summary["columns"][target])


def test_two_stores_of_one_encoder_are_refused(activations: str, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 stores are from encoder .*: give one store per encoder"):
        run_probe(config(f"{activations},{activations}", small_data, tmp_path))


def test_an_outcome_of_an_unknown_prompt_is_an_error_unless_ignored(
    activations: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = pq.read_table(small_data / "outcomes.parquet")
    stray = pa.table({"prompt_id": ["nobody"], "target": ["big"], "correct": [1.0], "output_tokens": [5]})
    pq.write_table(pa.concat_tables([outcomes, stray.cast(outcomes.schema)]), tmp_path / "outcomes.parquet")
    arguments = (activations, str(tmp_path / "outcomes.parquet"), str(small_data / "pool.toml"))
    with pytest.raises(UserError, match='prompt_id "nobody" has outcomes but no activations'):
        GradedStore.open(*arguments, ignore_unknown=False)
    assert len(GradedStore.open(*arguments, ignore_unknown=True).graded_keys) == 240
    assert "ignored 1 graded prompts that have no activations" in capsys.readouterr().err


def test_outcomes_of_another_corpus_show_an_id_of_each(activations: str, small_data: Path, tmp_path: Path) -> None:
    outcomes = pq.read_table(small_data / "outcomes.parquet")
    ids = pa.array([f"other-{i}" for i in range(len(outcomes))])
    pq.write_table(outcomes.drop_columns("prompt_id").append_column("prompt_id", ids), tmp_path / "outcomes.parquet")
    arguments = (activations, str(tmp_path / "outcomes.parquet"), str(small_data / "pool.toml"))
    message = r"has no outcome for .*: its ids look like other-\d+, those of the activations like \S+: check"
    with pytest.raises(UserError, match=message):
        GradedStore.open(*arguments, ignore_unknown=False)
