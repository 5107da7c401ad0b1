from __future__ import annotations

import re
from datetime import UTC, date, datetime

import numpy as np
import pytest

from prefill_router.policy.pool import Pool, Target
from prefill_router.policy.selection import NO_TARGET, choose
from prefill_router.query_log.aggregates import EVERYTHING, OTHERS, TOLERANCES, Lines, Tally, day_of
from prefill_router.reports.label_page import LabelReport, render_html


def lines(num_lines: int, seed: int = 0) -> Lines:
    rng = np.random.default_rng(seed)
    p = rng.random((num_lines, 2))
    cost = rng.random((num_lines, 2)) * [1e-3, 1e-4]
    used = rng.integers(-1, 2, num_lines)
    paid = np.where(used >= 0, rng.random(num_lines) * 1e-3, np.nan)
    percentile = rng.random(num_lines).astype(np.float32)
    return Lines(rng.integers(1, 90, num_lines), p, cost, percentile, rng.integers(-1, 2, num_lines), used, paid)


def of(some: Lines, **columns: list[str]) -> Tally:
    return Tally.of(some, columns, np.ones(some.p_correct.shape, bool))


def test_a_log_counts_the_same_however_it_is_cut() -> None:
    whole = lines(100)
    teams = ["a" if i % 3 else "b" for i in range(100)]
    once = of(whole, team=teams)
    parts = [np.arange(0, 30), np.arange(30, 31), np.arange(31, 100)]
    merged = Tally()
    for rows in reversed(parts):
        merged.merge(of(whole.take(rows), team=[teams[i] for i in rows]))
    assert merged.segments.keys() == once.segments.keys() == {EVERYTHING, ("team", "a"), ("team", "b")}
    for segment, sums in once.segments.items():
        for name, values in sums.values.items():
            np.testing.assert_allclose(merged.segments[segment][name], values, rtol=1e-12)


def test_sums_are_those_of_the_lines() -> None:
    some = lines(50)
    sums = of(some).everything
    chosen = [i for i in range(50) if some.chosen[i] >= 0]
    assert sums.total("lines") == 50
    assert sums.total("chosen_cost_usd") == pytest.approx(sum(some.cost_usd[i, some.chosen[i]] for i in chosen))
    assert sums["chosen"].tolist() == [int((some.chosen == t).sum()) for t in (0, 1)]
    assert sums.total("used_cost_usd") == pytest.approx(np.nansum(some.used_cost_usd))
    assert sums["tolerance_correct"][0] == pytest.approx(some.p_correct.max(1).sum())
    assert sums["tolerance_cost_usd"][-1] == pytest.approx(some.cost_usd.min(1).sum())
    assert len(sums["tolerance_cost_usd"]) == len(TOLERANCES)


def test_costs_along_the_tolerances_are_those_of_the_choices() -> None:
    some = lines(60)
    eligible = np.random.default_rng(1).random((60, 2)) < 0.7  # of some lines no target
    sums = Tally.of(some, {}, eligible).everything
    for k, tolerance in enumerate(TOLERANCES):
        chosen = choose(some.p_correct, some.cost_usd, tolerance, eligible)
        rows = np.flatnonzero(chosen != NO_TARGET)
        for name, values in (("tolerance_cost_usd", some.cost_usd), ("tolerance_correct", some.p_correct)):
            assert sums[name][k] == pytest.approx(values[rows, chosen[rows]].sum())
    nothing = Tally.of(some, {}, np.zeros((60, 2), bool)).everything
    assert not nothing["tolerance_cost_usd"].any()


def test_a_tally_is_read_as_it_was_written() -> None:
    tally = of(lines(20), team=["a"] * 20)
    again = Tally.from_json(tally.to_json())
    assert again.to_json() == tally.to_json()


def test_a_column_of_endless_values_does_not_grow_without_end() -> None:
    tally = Tally()
    for start in (0, 900, 1800):
        tally.merge(of(lines(900), user=[f"u{start + i}" for i in range(900)]))
    assert len(tally.values_of("user")) == 1001
    assert tally.segments["user", OTHERS].total("lines") == 1700


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("2026-11-02T23:30:00-05:00", "2026-11-03"),
        ("2026-11-02 10:00:00", "2026-11-02"),
        ("2026-11-02", "2026-11-02"),
        (1793577600, "2026-11-02"),
        (1793577600000, "2026-11-02"),
        ("1793577600.5", "2026-11-02"),
        (datetime(2026, 11, 2, 1, tzinfo=UTC), "2026-11-02"),
        (date(2026, 11, 2), "2026-11-02"),
        ("yesterday", "unknown"),
        (None, "unknown"),
        (float("nan"), "unknown"),
        (1e300, "unknown"),
    ],
)
def test_days_of_times_as_logs_write_them(value: object, day: str) -> None:
    assert day_of(value) == day


def test_the_page_tells_what_the_log_costs_and_escapes_what_it_holds() -> None:
    pool = Pool(
        name="p",
        targets=(
            Target(name="big", input_price=2.0, output_price=8.0),
            Target(name="small", input_price=0.1, output_price=0.4),
        ),
    )
    tally = of(lines(40), team=["<script>"] * 40)
    page = render_html(LabelReport("v1", pool, 0.02, None, tally, 3, {"Log": "log.jsonl"}))
    assert "40 lines:" in page
    assert "always big" in page
    advised = re.search(r"Tolerance ([\d.]+) is the cheapest .* as accurate as big alone: it costs \$([\d.]+)", page)
    assert advised
    is_as_good = tally.everything["tolerance_correct"] >= tally.everything["correct"][0]
    cheapest = tally.everything["tolerance_cost_usd"][is_as_good].min()
    assert float(advised[2]) == pytest.approx(cheapest, rel=0.05)
    k = int(np.argmin(np.abs(np.asarray(TOLERANCES) - float(advised[1]))))
    assert tally.everything["tolerance_cost_usd"][k] == cheapest
    rows = re.findall(r"router, tolerance ([\d.]+)(: this choice)?</th><td>\$([\d.]+)", page)
    assert rows[0][:2] == ("0.020", ": this choice")
    costs = [float(cost) for _, _, cost in rows[1:]]
    assert len(costs) > 5
    assert max(-np.diff(costs)) < 2 * np.mean(-np.diff(costs))  # about equal steps
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert all(link.startswith("#") for link in re.findall(r"(?:src|href)=\"([^\"]*)", page))
    assert not re.search(r"@import|<script|url\([\"']?[^#\"']", page)
