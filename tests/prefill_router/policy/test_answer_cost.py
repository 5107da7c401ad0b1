from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.common.errors import UserError
from prefill_router.policy.answer_cost import (
    answer_costs,
    billed_share,
    check_prices,
    implied_lengths,
    with_answer_prices,
)
from prefill_router.policy.pool import Pool, Target, load_pool

NAN = float("nan")
# Prices are 2 and 8 USD per million tokens; the output of "free" is free.
POOL = Pool(
    name="pair",
    targets=(
        Target(name="big", input_price=2.0, output_price=8.0),
        Target(name="free", input_price=1.0, output_price=0.0),
    ),
)


def test_an_answer_costs_what_was_billed_or_what_its_tokens_cost() -> None:
    lengths = np.array([[100.0, 50.0], [NAN, NAN], [100.0, NAN]])
    billed = np.array([[NAN, 0.5], [0.25, NAN], [NAN, 0.0]])
    costs = answer_costs(POOL, np.array([10, 20, 30]), lengths, billed, np.array([1000.0, 1.0]))
    np.testing.assert_allclose(costs, [[820e-6, 0.5], [0.25, 20e-6], [860e-6, 0.0]])
    computed = answer_costs(POOL, np.array([10, 20, 30]), lengths, None, np.array([1000.0, 1.0]))
    np.testing.assert_allclose(computed, [[820e-6, 10e-6], [8040e-6, 20e-6], [860e-6, 30e-6]])


def test_a_billed_cost_implies_a_length_where_none_is_known() -> None:
    lengths = np.array([[100.0, 50.0], [NAN, NAN], [NAN, NAN]])
    billed = np.array([[0.5, 0.5], [840e-6, 0.5], [39e-6, NAN]])  # the last is less than the input costs
    implied = implied_lengths(POOL, np.array([10, 20, 20]), lengths, billed)
    np.testing.assert_allclose(implied, [[100.0, 50.0], [100.0, NAN], [0.0, NAN]], rtol=1e-6)


@given(st.integers(1, 10**5), st.floats(0.0, 1e5), st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_implied_lengths_cost_what_was_billed(tokens: int, length: float, input_price: float, price: float) -> None:
    pool = Pool(name="one", targets=(Target(name="x", input_price=input_price, output_price=price),))
    billed = pool.expected_cost(np.array([tokens]), np.array([[length]]))
    implied = implied_lengths(pool, np.array([tokens]), np.array([[NAN]]), billed)
    assert pool.expected_cost(np.array([tokens]), implied) == pytest.approx(billed, rel=1e-6)


def test_a_target_without_prices_gets_its_mean_billed_cost_as_price_of_an_answer() -> None:
    free = {"input_price": 0.0, "output_price": 0.0}
    targets = (POOL.targets[0], Target(name="bare"), Target(name="zero", **free), Target(name="unknown", **free))
    billed = np.array([[0.5, 0.25, NAN, NAN], [0.5, 0.75, 1.0, NAN]])
    pool = with_answer_prices(Pool(name="p", targets=targets), np.hstack([billed, billed]))
    assert [target.usd_per_answer for target in pool.targets] == [0.0, 0.5, 1.0, 0.0]
    assert [target.is_priced for target in pool.targets] == [True] * 4
    assert Pool.model_validate(pool.model_dump()) == pool
    costs = pool.expected_cost(np.array([10]), np.array([[100.0] * 4]))
    np.testing.assert_allclose(costs, [[820e-6, 0.5, 1.0, 0.0]])
    assert pool.targets[1].cost(10, 100) == 0.5


def test_prices_may_be_absent_only_if_every_answer_has_a_cost(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text('[[p]]\nname = "a"\n[[p]]\nname = "b"\ninput_price = 1\noutput_price = 1\n')
    with pytest.raises(UserError, match=r'target "a": input_price is missing: give .*, or usd_per_answer'):
        load_pool(str(path))
    pool, uri = load_pool(str(path), prices_optional=True), str(tmp_path / "outcomes.parquet")
    rows = {"prompt_id": ["p", "q", "p"], "target": ["a", "a", "b"], "correct": [1.0, 0.0, 1.0]}
    pq.write_table(pa.table({**rows, "cost_usd": [0.5, 0.5, None]}), uri)
    check_prices(pool, uri)
    pq.write_table(pa.table({**rows, "cost_usd": [0.5, None, None]}), uri)
    with pytest.raises(
        UserError, match=r'"a": input_price is missing, and 1 of its outcomes .* have no cost_usd.* passed as --pool'
    ):
        check_prices(pool, uri)
    path.write_text('[[p]]\nname = "a"\nusd_per_answer = 0.5\n')
    assert load_pool(str(path)).targets[0].cost(10, 10) == 0.5


def test_the_billed_share_is_of_graded_answers() -> None:
    correct = np.array([[1.0, NAN], [0.0, 0.85]])
    assert billed_share(correct, np.array([[0.1, 0.1], [NAN, NAN]])) == pytest.approx(1 / 3)
    assert billed_share(correct, None) == 0.0
