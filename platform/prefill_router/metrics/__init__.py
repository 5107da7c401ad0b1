"""Router metrics and their confidence intervals; start with `score_routing`, or `Scorer` for a bootstrap.

Definitions are in platform/METHOD.md, "Metrics", unless a docstring names another source. Routing metrics use the
complete prompts: those on which every target has an outcome. Metrics of one target use the prompts on which that target
has an outcome. A missing outcome is never counted as a wrong answer. If missing outcomes depend on how hard a prompt
is, `completeness_weights` corrects the resulting bias.
"""

from prefill_router.metrics.bootstrap import Interval, bootstrap_weights, interval, interval_from_draws
from prefill_router.metrics.choices import Zones, agreement_zones, risk_coverage_curve, routing_shares
from prefill_router.metrics.curve import (
    Sweep,
    auccc,
    cost_coverage_curve,
    pareto_frontier,
    spread_by_cost,
    tolerance_curve,
    with_fewest_decimals,
)
from prefill_router.metrics.discrimination import brier_score, expected_calibration_error, reliability_curve, roc_auc
from prefill_router.metrics.missing import completeness_weights
from prefill_router.metrics.peers import (
    arena_score,
    average_improvement_in_quality,
    average_performance_gap_recovered,
    call_performance_threshold,
)
from prefill_router.metrics.scores import ENOUGH_VALIDATION, RoutingScores, Scorer, best_tolerance, score_routing

__all__ = [
    "ENOUGH_VALIDATION",
    "Interval",
    "RoutingScores",
    "Scorer",
    "Sweep",
    "Zones",
    "agreement_zones",
    "arena_score",
    "auccc",
    "average_improvement_in_quality",
    "average_performance_gap_recovered",
    "best_tolerance",
    "bootstrap_weights",
    "brier_score",
    "call_performance_threshold",
    "completeness_weights",
    "cost_coverage_curve",
    "expected_calibration_error",
    "interval",
    "interval_from_draws",
    "pareto_frontier",
    "reliability_curve",
    "risk_coverage_curve",
    "roc_auc",
    "routing_shares",
    "score_routing",
    "spread_by_cost",
    "tolerance_curve",
    "with_fewest_decimals",
]
