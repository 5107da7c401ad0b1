"""`train --extend`: a new target, a dropped target, a new price."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from prefill_jobs.options import TrainConfig
from prefill_jobs.train.train_job import train
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import Part, prompt_hashes
from prefill_router.router.artifact import Router
from stores import content_groups

pytestmark = pytest.mark.usefixtures("in_process")

PROMPTS = ["what is one plus two", "name a river in that old town", "one one one", "seven"]

TARGET_TOML = '[[pool]]\nname = "{name}"\ninput_price = {price}\noutput_price = {price}\n'


def pool_file(folder: Path, **prices: float) -> str:
    path = folder / "pool.toml"
    path.write_text("".join(TARGET_TOML.format(name=name, price=price) for name, price in prices.items()))
    return str(path)


@pytest.fixture
def outcomes_of_three(small_data: Path, tmp_path: Path) -> str:
    """The outcomes of "big" and "small", and of "like_small", which is right whenever "small" is."""
    table = pq.read_table(small_data / "outcomes.parquet")
    small = table.filter(pc.equal(table["target"], "small"))
    names = pa.array(["like_small"] * len(small))
    longer = pc.multiply(small["output_tokens"], pa.scalar(3, pa.int32()))
    more = small.set_column(1, "target", names).set_column(3, "output_tokens", longer)
    pq.write_table(pa.concat_tables([table, more]), tmp_path / "outcomes.parquet")
    return str(tmp_path / "outcomes.parquet")


def test_a_new_target_joins_and_the_others_stay(
    router: str, activations: str, outcomes_of_three: str, tmp_path: Path
) -> None:
    more = train(
        TrainConfig(
            extend=router,
            activations=activations,
            outcomes=outcomes_of_three,
            pool=pool_file(tmp_path, big=2.0, like_small=0.2, small=0.1),
            out=str(tmp_path / "router"),
        )
    )
    before, after = Router.load(router), Router.load(str(tmp_path / "router"))
    assert after.version == more.version != before.version
    assert after.pool.target_names == ["big", "like_small", "small"]
    for old, new in zip(before.predict(PROMPTS), after.predict(PROMPTS), strict=True):
        np.testing.assert_allclose(new[:, [0, 2]], old, rtol=1e-5)
    p, tokens = after.predict(PROMPTS)
    assert p[0, 1] > p[1, 1] + 0.2
    np.testing.assert_allclose(tokens[:, 1], 3 * tokens[:, 2], rtol=0.35)
    assert after.training["num_answers"]["like_small"] > 100
    assert after.training["extends"] == before.version


def test_what_is_held_out_stays_unseen(router: str, activations: str, outcomes_of_three: str, tmp_path: Path) -> None:
    pool = pool_file(tmp_path, big=2.0, like_small=0.2)
    data = {"extend": router, "activations": activations, "pool": pool}
    first = train(TrainConfig(**data, outcomes=outcomes_of_three, out=str(tmp_path / "first")))
    table = pq.read_table(outcomes_of_three)
    groups = content_groups(activations).of(prompt_hashes(table["prompt_id"].to_pylist()))
    is_held_out = first.split.parts(groups) == Part.TEST
    flipped = np.where(is_held_out, 1.0 - table["correct"].to_numpy(), table["correct"].to_numpy())
    pq.write_table(table.set_column(2, "correct", pa.array(flipped, pa.float32())), tmp_path / "flipped.parquet")
    again = train(TrainConfig(**data, outcomes=str(tmp_path / "flipped.parquet"), out=str(tmp_path / "again")))
    assert again.version == first.version


def test_dropping_and_repricing_need_no_data(router: str, tmp_path: Path) -> None:
    pool = pool_file(tmp_path, small=7.0)
    train(TrainConfig(extend=router, pool=pool, out=str(tmp_path / "router")))
    before, after = Router.load(router), Router.load(str(tmp_path / "router"))
    assert after.pool.target_names == ["small"]
    assert after.pool.targets[0].output_price == 7.0
    for old, new in zip(before.predict(PROMPTS), after.predict(PROMPTS), strict=True):
        np.testing.assert_allclose(new[:, 0], old[:, 1], rtol=1e-5)


def test_a_new_target_needs_outcomes(router: str, activations: str, outcomes_of_three: str, tmp_path: Path) -> None:
    pool = pool_file(tmp_path, big=2.0, like_small=0.2)
    with pytest.raises(UserError, match="--activations and --outcomes are missing"):
        train(TrainConfig(extend=router, pool=pool, out=str(tmp_path / "router")))
    table = pq.read_table(outcomes_of_three)
    few = table.filter(pc.equal(table["target"], "like_small")).slice(0, 30)
    pq.write_table(few, tmp_path / "few.parquet")
    with pytest.raises(UserError, match=r'few\.parquet: target "like_small" has \d+ outcomes .* at least 50'):
        train(
            TrainConfig(
                extend=router,
                activations=activations,
                outcomes=str(tmp_path / "few.parquet"),
                pool=pool,
                out=str(tmp_path / "router"),
            )
        )
    assert not (tmp_path / "router").exists()


def test_no_router_is_replaced_unless_asked(router: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already has a router"):
        train(TrainConfig(extend=router, pool=pool_file(tmp_path, small=1.0), out=router))
