"""Training and evaluation on outcomes with billed costs, in place of lengths or of prices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_jobs.evaluate.evaluate_job import evaluate
from prefill_jobs.options import EvaluateConfig, TrainConfig
from prefill_jobs.train.train_job import train
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import prompt_hashes
from prefill_router.evaluation.results import Evaluation
from prefill_router.policy.pool import load_pool
from prefill_router.router.artifact import Router

pytestmark = pytest.mark.usefixtures("in_process")


def costs_of(table: pa.Table, activations: str, pool: str) -> list[float]:
    """What each answer of the table costs by its tokens."""
    store = ActivationStore.open(activations)
    num_tokens: dict[str, int] = {}
    for shard in range(store.num_shards):
        ids, encoded = store.read(shard, [])
        num_tokens |= dict(zip(ids.to_pylist(), encoded["num_tokens"].tolist(), strict=True))
    targets = {target.name: target for target in load_pool(pool).targets}
    return [
        targets[row["target"]].cost(num_tokens[row["prompt_id"]], row["output_tokens"]) for row in table.to_pylist()
    ]


def trained(folder: Path, activations: str, table: pa.Table, pool: str, recipe: str = "best") -> Router:
    folder.mkdir()
    pq.write_table(table, folder / "outcomes.parquet")
    given = {"activations": activations, "outcomes": str(folder / "outcomes.parquet"), "pool": pool}
    return train(TrainConfig(**given, out=str(folder / "router"), recipe=recipe, seeds=2, keep=1, max_epochs=3))


def evaluated(folder: Path, activations: str) -> Evaluation:
    given = {"router": str(folder / "router"), "outcomes": str(folder / "outcomes.parquet")}
    return evaluate(EvaluateConfig(**given, activations=activations, out=str(folder / "report"), draws=20))


@pytest.mark.parametrize("recipe", ["best", "published"])
def test_costs_teach_what_lengths_teach(recipe: str, activations: str, small_data: Path, tmp_path: Path) -> None:
    """In the mixed table "big" has billed costs and no lengths; "small" has lengths, and half of its costs."""
    pool, table = str(small_data / "pool.toml"), pq.read_table(small_data / "outcomes.parquet")
    billed, is_big = costs_of(table, activations, pool), pa.compute.equal(table["target"], "big")
    lengths = pa.compute.if_else(is_big, pa.scalar(None, pa.int32()), table["output_tokens"])
    known = [
        cost if big.as_py() or i % 4 < 2 else None for i, (cost, big) in enumerate(zip(billed, is_big, strict=True))
    ]
    mixed = table.set_column(3, "output_tokens", lengths).append_column("cost_usd", pa.array(known, pa.float64()))
    by_length = trained(tmp_path / "lengths", activations, table, pool, recipe)
    by_cost = trained(tmp_path / "costs", activations, mixed, pool, recipe)
    prompts = ["what is one plus two", "name a river in that old town"]
    predictions = [router.predict(prompts).expected_output_tokens for router in (by_length, by_cost)]
    np.testing.assert_allclose(predictions[1], predictions[0], rtol=1e-3)
    assert by_cost.default_tolerance == by_length.default_tolerance

    before, after = (evaluated(tmp_path / name, activations) for name in ("lengths", "costs"))
    assert after.router.cost == pytest.approx(before.router.cost, rel=1e-5)
    assert after.target_cost == pytest.approx(before.target_cost, rel=1e-5)
    is_new = ~np.isin(prompt_hashes(table["prompt_id"].to_pylist()), by_cost.training_prompts)
    is_billed = np.array([cost is not None for cost in known])
    assert (before.billed_share, after.billed_share) == (0.0, pytest.approx(is_billed[is_new].mean()))
    page = (tmp_path / "costs" / "report" / "report.html").read_text()
    assert f"{after.billed_share:.1%} of the answers are counted as billed" in page


def test_a_pool_without_prices_learns_a_price_per_answer(activations: str, small_data: Path, tmp_path: Path) -> None:
    pool, table = tmp_path / "pool.toml", pq.read_table(small_data / "outcomes.parquet")
    counts = Counter(table["prompt_id"].to_pylist())
    table = table.filter(pa.array([counts[prompt_id] == 2 for prompt_id in table["prompt_id"].to_pylist()]))
    pool.write_text('[[pool]]\nname = "big"\n[[pool]]\nname = "small"\n')
    is_big = np.array([target == "big" for target in table["target"].to_pylist()])
    billed = np.where(is_big, 0.02, 0.001) * np.random.default_rng(0).uniform(0.5, 1.5, len(table))
    table = table.drop_columns(["output_tokens"])
    with pytest.raises(UserError, match=r'target "big": input_price is missing, and \d+ of its outcomes'):
        trained(tmp_path / "unknown", activations, table, str(pool))
    table = table.append_column("cost_usd", pa.array(billed))
    router = trained(tmp_path / "known", activations, table, str(pool))
    is_seen = np.isin(prompt_hashes(table["prompt_id"].to_pylist()), router.training_prompts)
    means = [billed[is_seen & of_target].mean() for of_target in (is_big, ~is_big)]
    assert [target.usd_per_answer for target in router.pool.targets] == pytest.approx(means, rel=1e-6)
    decision = Router.load(str(tmp_path / "known" / "router")).route("what is one plus two")
    assert list(decision.expected_cost_usd.values()) == pytest.approx(means, rel=1e-6)

    evaluation = evaluated(tmp_path / "known", activations)
    assert evaluation.billed_share == 1.0
    assert evaluation.num_complete == evaluation.num_held_out
    assert evaluation.target_cost == pytest.approx([billed[~is_seen & of].mean() for of in (is_big, ~is_big)])
