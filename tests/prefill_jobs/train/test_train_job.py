from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_jobs.options import TrainConfig
from prefill_jobs.train.train_job import _of_every_target, train
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import Part, Split, prompt_hashes
from prefill_router.router.artifact import Router
from stores import content_groups

pytestmark = pytest.mark.usefixtures("in_process")

PROMPTS = ["what is one plus two", "name a river in that old town"]


def config(activations: str, small_data: Path, out: Path, **options: int | float | str) -> TrainConfig:
    return TrainConfig(
        **{
            "activations": activations,
            "outcomes": str(small_data / "outcomes.parquet"),
            "pool": str(small_data / "pool.toml"),
            "out": str(out),
            "seeds": 4,
            "keep": 2,
            **options,
        }
    )


def test_the_router_tells_the_prompts_that_the_small_target_answers(router: str) -> None:
    loaded = Router.load(router)
    prediction = loaded.predict(["what is one plus two", "name a river in that old town"])
    assert prediction.p_correct.shape == prediction.expected_output_tokens.shape == (2, 2)
    big, small = 0, 1
    assert prediction.p_correct[0, small] > prediction.p_correct[1, small] + 0.2
    assert (prediction.p_correct[:, big] > 0.6).all()
    assert ((prediction.expected_output_tokens > 30) & (prediction.expected_output_tokens < 130)).all()


def test_the_test_part_is_never_seen(router: str, activations: str, small_data: Path) -> None:
    ids = pq.read_table(small_data / "corpus.parquet")["prompt_id"].to_pylist()
    parts = Split(seed=0, test_fraction=0.2).parts(content_groups(activations).of(prompt_hashes(ids)))
    hidden = [i for i, part in zip(ids, parts, strict=True) if part == Part.TEST]
    seen = Router.load(router).training_prompts
    assert 20 < len(hidden) < 80
    assert not np.isin(prompt_hashes(hidden), seen).any()
    assert len(seen) == len(ids) - len(hidden)


def test_a_second_run_gives_the_same_router(router: str, activations: str, small_data: Path, tmp_path: Path) -> None:
    again = train(config(activations, small_data, tmp_path / "again"))
    first = Router.load(router)
    np.testing.assert_allclose(again.predict(["one two"]).p_correct, first.predict(["one two"]).p_correct, atol=1e-5)
    assert [p.column for p in again.projections] == [p.column for p in first.projections]


def test_the_published_recipe_prices_at_the_median_length(
    router: str, activations: str, small_data: Path, tmp_path: Path
) -> None:
    published = train(config(activations, small_data, tmp_path / "router", recipe="published", max_epochs=3))
    table = pq.read_table(small_data / "outcomes.parquet")
    groups = content_groups(activations).of(prompt_hashes(table["prompt_id"].to_pylist()))
    seen = table.filter(pa.array(published.split.parts(groups) == Part.TRAIN))
    for t, target in enumerate(["big", "small"]):
        lengths = seen.filter(pa.compute.equal(seen["target"], target))["output_tokens"].to_numpy()
        np.testing.assert_allclose(
            published.predict(PROMPTS).expected_output_tokens[:, t], np.median(lengths), rtol=0.02
        )
    assert published.kernel_weight == 0.0
    assert set(published.calibration.kinds) == {"none"}


def test_lengths_may_be_unknown(activations: str, small_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(small_data / "outcomes.parquet").drop_columns(["output_tokens"])
    pq.write_table(table, tmp_path / "outcomes.parquet")
    trained = train(
        config(activations, small_data, tmp_path / "router", outcomes=str(tmp_path / "outcomes.parquet"), max_epochs=2)
    )
    np.testing.assert_allclose(trained.predict(["one two"]).expected_output_tokens, 256.0, rtol=1e-4)


def test_a_router_is_replaced_only_when_asked(router: str, activations: str, small_data: Path) -> None:
    with pytest.raises(UserError, match="already has a router"):
        train(config(activations, small_data, Path(router)))


def test_too_few_prompts_are_refused(activations: str, small_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(small_data / "outcomes.parquet")
    few = table.filter(pa.compute.is_in(table["prompt_id"], pa.array(["p000"])))
    pq.write_table(few, tmp_path / "outcomes.parquet")
    with pytest.raises(UserError, match="graded prompts leave"):
        train(config(activations, small_data, tmp_path / "router", outcomes=str(tmp_path / "outcomes.parquet")))
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize(("num_free", "is_doubted"), [(3, False), (100, True)])
def test_prices_are_doubted_if_many_answers_were_billed_for_their_prompts_alone(
    num_free: int,
    is_doubted: bool,
    activations: str,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = pq.read_table(small_data / "outcomes.parquet")
    costs = [0.0 if i % 100 < num_free else 0.01 for i in range(len(given))]
    lengths = pa.nulls(len(given), pa.int32())
    billed = given.set_column(given.column_names.index("output_tokens"), "output_tokens", lengths)
    pq.write_table(billed.append_column("cost_usd", pa.array(costs)), tmp_path / "outcomes.parquet")
    quick = {"outcomes": str(tmp_path / "outcomes.parquet"), "seeds": 1, "keep": 1, "max_epochs": 1}
    train(config(activations, small_data, tmp_path / "router", **quick))
    assert ("check the prices" in "".join(capsys.readouterr())) == is_doubted


def test_where_few_prompts_are_graded_on_every_target_p_correct_stands_in() -> None:
    correct = np.array([[1.0, np.nan], [np.nan, 0.0]], np.float32)
    p_correct = np.array([[0.2, 0.3], [0.4, 0.5]], np.float32)
    np.testing.assert_array_equal(_of_every_target(correct, p_correct), np.array([[1.0, 0.3], [0.4, 0.0]], np.float32))
    half = np.append(correct, [[1.0, 0.0], [0.0, 1.0]], axis=0).astype(np.float32)
    assert _of_every_target(half, np.full_like(half, 0.5)) is half
