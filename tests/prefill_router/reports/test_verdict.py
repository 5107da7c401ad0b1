"""The verdict of a report: a tolerance and its saving, a trade, a single target, or too little data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prefill_router.evaluation.contenders import Contender, HeldOut, evaluate
from prefill_router.evaluation.results import Evaluation
from prefill_router.metrics import Interval
from prefill_router.policy.pool import Pool, Target
from prefill_router.reports.verdict import verdict

SAVES, COSTS = Interval(0.0005, 0.0004, 0.0006), Interval(-0.0005, -0.0006, -0.0004)  # USD per prompt
SAME, WORSE, BETTER = (Interval(x, x - 0.01, x + 0.01) for x in (0.0, -0.02, 0.02))


@pytest.fixture(scope="module")
def measured() -> Evaluation:
    """Of targets whose answers cost the same, on 200 prompts."""
    rng = np.random.default_rng(0)
    shape = (200, 2)
    p = rng.random(shape)
    correct = (rng.random(shape) < p).astype(np.float32)
    held_out = HeldOut(rng.integers(9, 99, 200), correct, np.full(shape, 50.0, np.float32))
    targets = (
        Target(name="dear", input_price=2.0, output_price=8.0),
        Target(name="cheap", input_price=1.0, output_price=4.0),
    )
    router = Contender("router", "prefill router", p, np.full(shape, 50.0), 0.013)
    return evaluate(Pool(name="pool", targets=targets), "v1", held_out, router, num_validation=150, num_draws=20)


def judged(measured: Evaluation, saved: Interval, change: Interval, **others: object) -> Evaluation:
    """An evaluation whose targets differ, and whose router has these differences from the best single target."""
    point = replace(
        measured.operating_points[0],
        saved_usd=saved,
        accuracy_less_best_single=change,
        saving_against_best_single=Interval(0.25, 0.2, 0.3),
    )
    e = replace(measured, target_accuracy=[0.7, 0.6], target_cost=[0.002, 0.0001], operating_points=[point])
    return replace(e, **others)  # type: ignore[arg-type]


def test_a_saving_without_loss_names_the_tolerance_and_the_saving(measured: Evaluation) -> None:
    decision, evidence, tolerance = verdict(judged(measured, SAVES, SAME))
    assert decision == (
        "Set tolerance 0.013: it saves $0.500 ($0.400 to $0.600) per 1,000 requests, 25.0% of what always using dear, "
        "the best single target, costs, and changes the accuracy by +0.0% (-1.0% to +1.0%)."
    )
    assert tolerance == pytest.approx(0.013, abs=5e-4)
    assert evidence == (
        "It was chosen on 150 validation prompts and measured on 200 held-out ones. Intervals are for prompts of the "
        "same kind: what other prompts, targets or prices bring is not known."
    )


def test_where_the_routers_own_tolerance_loses_one_read_from_the_curve_is_named_with_a_warning(
    measured: Evaluation,
) -> None:
    e = judged(measured, SAVES, WORSE)
    other = replace(
        e.operating_points[0],
        title="accuracy of the best single target",
        tolerance=0.004,
        accuracy_less_best_single=SAME,
    )
    decision, evidence, tolerance = verdict(replace(e, operating_points=[*e.operating_points, other]))
    assert decision.startswith("Set tolerance 0.004: it saves ")
    assert tolerance == 0.004
    assert evidence.startswith("It was chosen on these held-out prompts: expect a little less")


@pytest.mark.parametrize(
    ("saved", "change", "decision"),
    [
        (
            SAVES,
            Interval(0.24, 0.18, 0.3),
            "Set tolerance 0.013: it saves $0.500 ($0.400 to $0.600) per 1,000 requests, 25.0% of what always using "
            "dear, the best single target, costs, and changes the accuracy by +24.0% (+18.0% to +30.0%).",
        ),
        (
            SAVES,
            Interval(-0.24, -0.3, -0.18),
            "Tolerance 0.013 saves $0.500 ($0.400 to $0.600) per 1,000 requests, but changes the accuracy by -24.0% "
            "(-30.0% to -18.0%) compared with always using dear, the best single target: set it if one right answer is "
            "worth less than $0.00208 to you.",
        ),
        (
            SAVES,
            WORSE,
            "Tolerance 0.013 saves $0.500 ($0.400 to $0.600) per 1,000 requests, but changes the accuracy by -2.0% "
            "(-3.0% to -1.0%) compared with always using dear, the best single target: set it if one right answer is "
            "worth less than $0.0250 to you.",
        ),
        (
            COSTS,
            BETTER,
            "Tolerance 0.013 raises the accuracy by +2.0% (+1.0% to +3.0%) over always using dear, the best single "
            "target, for $0.500 ($0.400 to $0.600) more per 1,000 requests: set it if one more right answer is worth "
            "$0.0250 to you.",
        ),
        (
            COSTS,
            SAME,
            "Use dear, the best single target, alone: no tolerance is shown to pay. Tolerance 0.013 costs $0.500 "
            "($0.400 to $0.600) more per 1,000 requests and changes the accuracy by +0.0% (-1.0% to +1.0%).",
        ),
        (
            SAVES,
            Interval(-0.03, -0.07, 0.01),
            "Use dear, the best single target, alone: no tolerance is shown to pay. Tolerance 0.013 saves $0.500 "
            "($0.400 to $0.600) per 1,000 requests, but may lose over 5% of accuracy: it changes the accuracy by "
            "-3.0% (-7.0% to +1.0%).",
        ),
        (
            Interval(0.0005, -0.0001, 0.0011),
            SAME,
            "Use dear, the best single target, alone: no tolerance is shown to pay. Tolerance 0.013 saves $0.500 "
            "(-$0.100 to $1.10) per 1,000 requests, but that may be chance, and changes the accuracy by +0.0% (-1.0% "
            "to +1.0%).",
        ),
    ],
)
def test_a_gain_that_has_its_price_and_none(
    measured: Evaluation, saved: Interval, change: Interval, decision: str
) -> None:
    assert verdict(judged(measured, saved, change)).decision == decision


def test_a_router_that_costs_ten_times_as_much_on_tiny_data_is_not_recommended(measured: Evaluation) -> None:
    unsure = Interval(0.0, -0.12, 0.12)
    e = judged(measured, Interval(-0.02, -0.03, -0.01), unsure, num_complete=60, num_validation=37)
    decision, evidence, tolerance = verdict(replace(e, target_accuracy=[0.6, 0.7]))
    assert decision.startswith(
        "The data is too little to choose a tolerance. Until there is more, use cheap, the best single target, alone: "
        "accuracy 70.0% at $"
    )
    assert tolerance is None
    # 60 prompts leave 12 points open; (12 / 5)^2 times as many leave 5.
    assert evidence == (
        "37 validation prompts chose tolerance 0.013, and 60 held-out prompts leave open how the router changes the "
        "accuracy: by -12.0% to +12.0%. About 350 held-out prompts and as many for validation would be enough to "
        "notice a loss of 5%: 10 times as many graded prompts as now."
    )


def test_few_validation_prompts_are_too_little_however_narrow_the_interval_is(measured: Evaluation) -> None:
    few = verdict(judged(measured, SAVES, SAME, num_validation=99))
    assert few.decision.startswith("The data is too little")
    assert "200 held-out prompts tell how the router changes the accuracy: by -1.0% to +1.0%." in few.evidence
    assert "About 100 held-out prompts" in few.evidence
    assert verdict(judged(measured, SAVES, SAME, num_validation=100)).decision.startswith("Set tolerance")
    assert "chosen on" not in verdict(judged(measured, SAVES, SAME, num_validation=None)).evidence
