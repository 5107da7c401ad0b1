"""Sums over calls, compared with sums made by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from prefill_serve.gateway.call_record import CallRecord, Usage
from prefill_serve.gateway.state.accounts import Accounts, Charged
from prefill_serve.settings import Budgets, DailyLimits, HardLimits

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
EXPECTED = {"small": 0.01, "big": 0.05}
P_CORRECT = {"small": 0.6, "big": 0.9}


def routed(target: str = "small", **fields: Any) -> CallRecord:
    """The record of a routed and answered call."""
    usual = {
        "request_id": "r",
        "caller": "ann",
        "at": NOON,
        "end": "answered",
        "target": target,
        "p_correct": P_CORRECT,
        "expected_cost_usd": EXPECTED,
        "usage": Usage(100, 20, 10),
        "cost_usd": 0.02,
    }
    return CallRecord(**{**usual, **fields})


def unrouted(end: Any = "answered", target: str | None = "small", **fields: Any) -> CallRecord:
    return CallRecord("r", "ann", NOON, end, target, **fields)


def booked(*calls: CallRecord) -> Accounts:
    accounts = Accounts()
    for call in calls:
        accounts.book(call)
    return accounts


def stats_of(*calls: CallRecord) -> Any:
    return booked(*calls).stats(NOON, 0.0, 0)


def test_before_the_first_call_there_is_nothing() -> None:
    stats = Accounts().stats(NOON, 0.0, 0)
    assert (stats.since, stats.calls, stats.targets, stats.actual_cost_usd) == (None, 0, {}, 0.0)
    assert (stats.against_dearest, stats.against_best_single) == (None, None)


def test_calls_are_counted_by_how_they_ended() -> None:
    ends: list[Any] = ["answered", "answered", "failed", "cancelled", "refused"]
    stats = stats_of(*(unrouted(end, None if end in ("failed", "refused") else "small") for end in ends))
    assert (stats.calls, stats.answered, stats.failed, stats.cancelled) == (5, 2, 1, 1)


def test_a_decision_alone_costs_nothing() -> None:
    stats = stats_of(routed(end="routed", usage=None, cost_usd=None))
    assert (stats.calls, stats.answered, stats.targets, stats.against_dearest) == (1, 0, {}, None)


def test_tokens_and_costs_are_summed_by_target() -> None:
    stats = stats_of(
        routed("small", cost_usd=0.02, usage=Usage(100, 20, 10)),
        routed("small", cost_usd=0.03, usage=Usage(50, 5, 0)),
        routed("big", cost_usd=0.10, usage=Usage(7, 8, 0)),
    )
    small, big = stats.targets["small"], stats.targets["big"]
    assert (small.answered, small.input_tokens, small.output_tokens, small.cached_tokens) == (2, 150, 25, 10)
    assert (big.answered, big.input_tokens, big.output_tokens, big.cached_tokens) == (1, 7, 8, 0)
    assert small.actual_cost_usd == pytest.approx(0.05)
    assert small.expected_cost_usd == pytest.approx(0.02)
    assert big.expected_cost_usd == pytest.approx(0.05)
    assert stats.actual_cost_usd == pytest.approx(0.15)
    assert stats.expected_cost_usd == pytest.approx(0.07)


def test_a_call_that_others_made_up_for_is_booked_once_and_its_failures_where_they_were() -> None:
    stats = stats_of(routed("big", failed=["small", "other"]))
    assert (stats.calls, stats.answered, stats.failed) == (1, 1, 0)
    assert {name: (sums.answered, sums.failed) for name, sums in stats.targets.items()} == {
        "big": (1, 0),
        "other": (0, 1),
        "small": (0, 1),
    }


def test_an_answer_that_broke_off_is_a_failure_of_its_target_and_costs_what_it_cost() -> None:
    stats = stats_of(routed("small", end="failed", cost_usd=0.02))
    assert (stats.answered, stats.failed) == (0, 1)
    assert (stats.targets["small"].answered, stats.targets["small"].failed) == (0, 1)
    assert stats.actual_cost_usd == pytest.approx(0.02)
    assert stats.against_dearest is None


def test_a_caller_who_hung_up_pays_for_what_was_metered() -> None:
    stats = stats_of(routed("small", end="cancelled", cost_usd=0.02))
    assert (stats.targets["small"].answered, stats.targets["small"].failed) == (0, 0)
    assert stats.spent_today_usd == pytest.approx(0.02)


def test_answers_without_a_decision_are_by_default_unless_their_target_was_given() -> None:
    stats = stats_of(unrouted(), unrouted(is_pinned=True), *[unrouted(is_sticky=True)] * 2, routed())
    assert (stats.by_default, stats.sticky) == (1, 2)


def test_answers_without_a_usage_are_unmetered_and_out_of_the_comparison_of_costs() -> None:
    stats = stats_of(routed(cost_usd=0.02), routed(usage=None, cost_usd=None))
    assert stats.unmetered == 1
    assert stats.metered_cost_usd == pytest.approx(0.02)
    assert stats.expected_cost_usd == pytest.approx(0.01)


def test_a_cost_that_was_not_reported_is_charged_and_out_of_the_comparison() -> None:
    stats = stats_of(routed(), routed(cost_usd=0.5, cost_kind="estimated", usage=None))
    assert (stats.unmetered, stats.answered) == (1, 2)
    assert stats.metered_cost_usd == pytest.approx(0.02)
    assert stats.actual_cost_usd == stats.spent_today_usd == pytest.approx(0.52)


def test_stats_say_which_costs_were_reported() -> None:
    stats = stats_of(
        routed(cost_usd=0.25),
        routed(cost_usd=0.5, cost_kind="estimated"),
        routed(cost_usd=0.125, cost_kind="reserved", end="cancelled", lost_usd={"big": 0.0625}),
        routed(cost_usd=None, end="failed", target=None, lost_usd={"big": 1.0}),
        routed(end="routed", usage=None, cost_usd=None),
    )
    charged = {kind: (each.calls, each.cost_usd) for kind, each in stats.charged.items()}
    assert charged == {"reported": (1, 0.25), "estimated": (1, 0.5), "reserved": (3, 1.1875)}
    assert stats.spent_today_usd == stats.actual_cost_usd == 1.9375
    assert stats.targets["big"].actual_cost_usd == 1.0625


def test_what_was_not_routed_is_not_compared() -> None:
    stats = stats_of(unrouted(usage=Usage(1, 1), cost_usd=1.0), routed(cost_usd=0.02))
    assert stats.metered_cost_usd == pytest.approx(0.02)
    assert stats.actual_cost_usd == pytest.approx(1.02)


def test_savings_are_against_the_dearest_and_the_best_single_target() -> None:
    first = {"p_correct": {"a": 0.9, "b": 0.5, "c": 0.6}, "expected_cost_usd": {"a": 0.04, "b": 0.01, "c": 0.09}}
    second = {"p_correct": {"a": 0.8, "b": 0.7, "c": 0.1}, "expected_cost_usd": {"a": 0.06, "b": 0.02, "c": 0.03}}
    stats = stats_of(routed("b", **first), routed("a", **second))  # expected cost 0.01 + 0.06
    dearest, best = stats.against_dearest, stats.against_best_single
    assert (dearest.target, best.target) == ("c", "a")
    assert dearest.expected_cost_usd == pytest.approx(0.12)
    assert dearest.saved_usd == pytest.approx(0.05)
    assert best.expected_cost_usd == pytest.approx(0.10)
    assert best.saved_usd == pytest.approx(0.03)


def test_since_is_the_oldest_call() -> None:
    assert stats_of(routed(), routed(at=NOON - timedelta(hours=3)), routed()).since == NOON - timedelta(hours=3)


# --- budgets -----------------------------------------------------------------------------------------------------


def test_without_budgets_all_fits() -> None:
    assert booked(routed(cost_usd=1e6)).fits(1e6, Budgets(), "ann", NOON)


def test_a_keys_budget_is_its_own() -> None:
    accounts, budgets = booked(routed(cost_usd=0.5), routed(cost_usd=0.5)), Budgets(keys={"ann": 1.0, "bob": 1.0})
    assert not accounts.fits(0.01, budgets, "ann", NOON)
    assert accounts.fits(0.01, budgets, "bob", NOON)
    assert accounts.fits(0.01, budgets, "eve", NOON)


def test_a_call_that_costs_nothing_fits_whatever_is_spent() -> None:
    accounts = booked(routed(cost_usd=2.0))
    for limits in (Budgets(usd_per_day=1.0), Budgets(keys={"ann": 1.0})):
        assert accounts.fits(0.0, limits, "ann", NOON)
        assert not accounts.fits(1e-9, limits, "ann", NOON)


def test_targets_that_cost_nothing_save_nothing() -> None:
    free = dict.fromkeys(("big", "small"), 0.0)
    stats = booked(routed(cost_usd=0.0, expected_cost_usd=free)).stats(NOON, 0.0, 0)
    assert stats.actual_cost_usd == stats.expected_cost_usd == stats.metered_cost_usd == 0.0
    assert stats.against_dearest is not None
    assert stats.against_dearest.saved_usd == 0.0
    assert stats.charged["reported"] == Charged(calls=1, cost_usd=0.0)


def test_a_call_fits_where_it_ends_with_its_budget() -> None:
    accounts = booked(routed(cost_usd=0.75))
    for budgets in (Budgets(usd_per_day=1.0), Budgets(keys={"ann": 1.0})):
        assert accounts.fits(0.25, budgets, "ann", NOON)
        assert not accounts.fits(0.26, budgets, "ann", NOON)


def test_the_budget_of_all_is_spent_by_all() -> None:
    accounts = booked(routed(cost_usd=0.5), routed(cost_usd=0.6, caller="bob"))
    assert not accounts.fits(0.01, Budgets(usd_per_day=1.0), "eve", NOON)
    assert accounts.fits(0.01, Budgets(usd_per_day=1.2), "eve", NOON)


def test_what_is_under_way_counts_as_if_it_were_spent() -> None:
    accounts = booked(routed(cost_usd=0.5))
    accounts.reservations.make("a", "ann", 0.25)
    accounts.reservations.make("b", "bob", 0.25)
    assert accounts.fits(0.25, Budgets(keys={"ann": 1.0}), "ann", NOON)
    assert not accounts.fits(0.26, Budgets(keys={"ann": 1.0}), "ann", NOON)
    assert not accounts.fits(0.01, Budgets(usd_per_day=1.0), "eve", NOON)


def test_into_a_budget_of_nothing_nothing_fits() -> None:
    for budgets in (Budgets(usd_per_day=0.0), Budgets(keys={"ann": 0.0})):
        assert not Accounts().fits(1e-6, budgets, "ann", NOON)


def test_at_midnight_in_utc_all_begin_anew() -> None:
    accounts, budgets = booked(routed(cost_usd=2.0)), Budgets(usd_per_day=1.0)
    last = datetime(2026, 3, 1, 23, 59, 59, tzinfo=UTC)
    assert not accounts.fits(0.1, budgets, "ann", last)
    assert accounts.fits(0.1, budgets, "ann", last + timedelta(seconds=1))
    assert accounts.stats(last + timedelta(seconds=1), 0.0, 0).spent_today_usd == 0.0


def test_the_day_is_that_of_utc_wherever_the_clock_stands() -> None:
    tokyo = timezone(timedelta(hours=9))
    accounts = booked(routed(cost_usd=2.0, at=datetime(2026, 3, 2, 8, 30, tzinfo=tokyo)))  # 23:30 on March 1st
    assert accounts.spent_today(datetime(2026, 3, 2, 8, 59, tzinfo=tokyo)) == {"ann": 2.0}
    assert accounts.spent_today(datetime(2026, 3, 2, 9, 1, tzinfo=tokyo)) == {}


def test_a_call_of_yesterday_that_is_booked_late_costs_nothing_today() -> None:
    accounts = booked(routed(cost_usd=0.5), routed(cost_usd=9.0, at=NOON - timedelta(days=1)))
    assert accounts.spent_today(NOON) == {"ann": 0.5}
    assert accounts.stats(NOON, 0.0, 0).actual_cost_usd == pytest.approx(9.5)


@pytest.mark.parametrize(
    ("hard", "key", "left_usd", "is_soon"),
    [
        ({"keys": {"ann": 1.0}}, "ann", 0.25, False),
        ({"keys": {"ann": 1.25}}, "ann", 0.5, True),
        ({"keys": {"ann": 9.0}, "usd_per_day": 1.75}, None, 0.25, True),
        ({"keys": {"bob": 0.1}, "usd_per_day": 1.0}, None, -0.5, False),
        ({"keys": {"ann": 1.0}, "usd_per_day": 1.0}, "ann", 0.25, False),
    ],
)
def test_a_refusal_says_which_limit_and_until_when(
    hard: dict[str, Any], key: str | None, left_usd: float, is_soon: bool
) -> None:
    accounts = booked(routed(cost_usd=0.5), routed(cost_usd=0.5, caller="bob"))
    accounts.reservations.make("t", "ann", 0.25)
    accounts.reservations.make("u", "bob", 0.25)
    limits = HardLimits(**hard)
    assert not accounts.fits(0.75, limits, "ann", NOON)
    found = accounts.exhausted(0.75, limits, "ann", NOON)
    assert (found.key, found.left_usd, found.call_usd) == (key, left_usd, 0.75)
    wait_s = 5 if is_soon else 12 * 3600
    assert (found.until, found.retry_after_s) == (NOON + timedelta(seconds=wait_s), wait_s)


def test_a_share_is_of_the_lower_limit() -> None:
    budgets = Budgets(
        usd_per_day=8.0, keys={"ann": 4.0, "bob": 1.0}, hard=HardLimits(usd_per_day=4.0, keys={"ann": 2.0})
    )
    assert budgets.lowest == DailyLimits(usd_per_day=4.0, keys={"ann": 2.0, "bob": 1.0})
    assert booked(routed(cost_usd=1.0)).shares(budgets, NOON) == {"ann": 0.5, "bob": 0.0, None: 0.25}
    assert Budgets().lowest == DailyLimits()
