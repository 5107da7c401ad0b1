"""The report of an evaluation: a verdict, tables and plots on one page that fetches nothing, for desk, phone, paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from prefill_router import storage
from prefill_router.common.money import usd
from prefill_router.evaluation.contenders import Evaluation, OperatingPoint, Standing
from prefill_router.evaluation.learning_curve import TIMES, LearnedFigure, LearningCurve
from prefill_router.evaluation.off_policy import PolicyValue
from prefill_router.metrics import Interval, RoutingScores
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS
from prefill_router.probe.layer_scores import LayerProbe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prefill_router.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
Cell = str | tuple[str, str]  # a figure, or a figure and its interval
Table = list[list[Cell]]


def render_html(evaluation: Evaluation, probes: Sequence[LayerProbe] | None = None, notice: str | None = None) -> str:
    """The report as one page; `notice` stands on top of it."""
    from prefill_router.reports import (
        figures,  # matplotlib takes long to import, and evaluations without a page need none
    )

    plots: dict[str, Callable[[float], Figure]] = {
        "curve": lambda width: figures.curve_figure(evaluation, width),
        "differences": lambda width: figures.differences_figure(evaluation, width),
        "shares": lambda width: figures.shares_figure(evaluation, width),
        "risk": lambda width: figures.risk_figure(evaluation, width),
        "reliability": lambda width: figures.reliability_figure(evaluation, width),
    }
    curve = evaluation.learning
    if curve and not curve.silence:
        plots["learning"] = lambda width: figures.learning_figure(curve, width)
    if probes:
        plots["probe"] = lambda width: figures.probe_figure(probes, width)
    return TEMPLATES.get_template("report.html").render(
        e=evaluation,
        notice=notice,
        headline=headline(evaluation),
        against_baselines=against_baselines(evaluation),
        plots={name: [figures.to_svg(plot(w)) for w in (figures.WIDE, figures.NARROW)] for name, plot in plots.items()},
        standings=_standing_rows(evaluation),
        operating_points=[_operating_row(point) for point in evaluation.operating_points],
        targets=_target_rows(evaluation),
        peers=_peer_rows(evaluation),
        zones=_zones(evaluation.router),
        missing=_missing(evaluation),
        uncalibrated=_uncalibrated(evaluation),
        outlook=curve and outlook(curve),
        lengths=[
            shown(error, ".0f")
            for error in (evaluation.length_error_tokens, evaluation.length_error_median_rule_tokens)
        ],
    )


def write(
    uri: str, evaluation: Evaluation, probes: Sequence[LayerProbe] | None = None, notice: str | None = None
) -> None:
    """Writes report.json and report.html below `uri`."""
    storage.write_json(storage.join(uri, "report.json"), evaluation.to_json())
    storage.write_bytes(storage.join(uri, "report.html"), render_html(evaluation, probes, notice).encode())


def headline(evaluation: Evaluation) -> str:
    """One sentence: what the router costs and answers, against the best single target."""
    router, point = evaluation.router, evaluation.operating_points[0]
    ranked = zip(
        evaluation.target_accuracy, (-cost for cost in evaluation.target_cost), evaluation.targets, strict=True
    )
    best = max(ranked, key=lambda single: single[:2])[2]
    saving = point.saving_against_best_single
    saved = f": {in_words(saving, '%')} saved" if isfinite(saving.value) else ""
    return (
        f"{in_words(point.accuracy, '%')} right at {shown(router.cost, '$')} for 1,000 prompts, against "
        f"{shown(router.best_single_accuracy, '%')} at {shown(router.best_single_cost, '$')} for always {best}{saved}."
    )


def against_baselines(evaluation: Evaluation) -> str:
    """One sentence: whether the router adds more over single targets than the baseline that adds most."""
    rivals = evaluation.baselines
    if not rivals:
        return "No baseline could be fitted on these data."
    best = max(rivals, key=lambda rival: rival.scores.mdp_auccc)
    num_beaten = sum(rival.router_less_this["mdp_auccc"].low > 0.0 for rival in rivals)
    less = best.router_less_this["mdp_auccc"]
    verdict = "it is better" if less.low > 0.0 else "it is worse" if less.high < 0.0 else "these prompts cannot tell"
    return (
        f"Over all tolerances it surely adds more than {num_beaten} of {len(rivals)} baselines; against the best, "
        f"{best.title}, {verdict}: MDP-AUCCC x 1000 differs by {in_words(less, '+m')}."
    )


def calibration_line(evaluation: Evaluation) -> str:
    """How far P(correct) can be taken at its word, and whether calibration did anything for it."""
    ece, before = (
        float(np.nanmean(values)) for values in (evaluation.calibration.ece, evaluation.calibration.ece_uncalibrated)
    )
    what = (
        "calibration changed nothing" if all(evaluation.calibration.unchanged) else f"{before:.3f} before calibration"
    )
    return f"mean ECE {ece:.3f}: {what}"


def _uncalibrated(evaluation: Evaluation) -> str:
    """The targets whose P(correct) calibration left as it was."""
    pairs = zip(evaluation.targets, evaluation.calibration.unchanged, strict=True)
    return ", ".join(target for target, is_unchanged in pairs if is_unchanged)


def outlook(curve: LearningCurve) -> str:
    """What more outcomes would bring, or why nothing is said of it."""
    if curve.silence:
        return f"Nothing is said of it: {curve.silence}."
    told = [_outlook(learned, *_LEARNT[name]) for name, learned in curve.figures.items()]
    if TIMES[-1] * curve.sizes[-1] > MAX_LANDMARKS:
        told.append(
            f"The router's own kernel machine learns from {MAX_LANDMARKS:,} prompts at most, and may gain less."
        )
    return " ".join(told)


def _outlook(learned: LearnedFigure, title: str, style: str) -> str:
    if learned.silence:
        return f"Of {title} nothing is said: {learned.silence}."
    twice, four_times = (in_words(ahead.gain, style) for ahead in learned.outlooks)
    return f"Twice the outcomes would bring about {twice} {title}, four times about {four_times}."


_LEARNT = {"mean_auc": ("mean AUC", "+.3f"), "mdp_auccc": ("MDP-AUCCC x 1000", "+m")}


def metric_rows(scores: RoutingScores) -> list[tuple[str, str]]:
    """The routing metrics of one router, as (name, text)."""
    return [(title, shown(getattr(scores, name), style)) for title, name, style in _METRICS]


_METRICS: list[tuple[str, str, str]] = [
    ("accuracy", "accuracy", "%"),
    ("cost of 1,000 prompts", "cost", "$"),
    ("efficacy (gap closed)", "efficacy", "%"),
    ("saving against the dearest target", "cost_saving", "%"),
    ("saving at the best single target's accuracy", "saving_at_best_single", "%"),
    ("efficacy at the most accurate tolerance", "best_efficacy", "%"),
    ("P-AUCCC", "p_auccc", ".4f"),
    ("MDP-AUCCC (what routing adds)", "mdp_auccc", ".4f"),
    ("PDP-AUCCC (what it leaves)", "pdp_auccc", ".4f"),
]


def policy_rows(values: Sequence[PolicyValue]) -> list[tuple[str, ...]]:
    """Counterfactual values as text, a row each, below a head."""
    head = ("policy", "doubly robust", "IPS", "self-normalised", "support", "worth requests")
    rows = [
        (
            value.policy,
            *(in_words(figure, "%") for figure in (value.doubly_robust, value.ips, value.snips)),
            shown(value.support, "%"),
            shown(value.effective_requests, ".0f"),
        )
        for value in values
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [tuple(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]


def paired_rows(standing: Standing) -> list[tuple[str, str]]:
    """What the first router has over this one, with intervals, as (name, text)."""
    return [(title, in_words(standing.router_less_this[name], style)) for title, name, style in _PAIRED]


_PAIRED = [
    ("accuracy, each at its own tolerance", "accuracy", "+%"),
    ("cost of 1,000 prompts", "cost", "$"),
    ("MDP-AUCCC x 1000", "mdp_auccc", "+m"),
    ("mean AUC", "mean_auc", "+.4f"),
    ("mean Brier score", "mean_brier", "+.4f"),
]


# --- tables ----------------------------------------------------------------------------------------------------------


def _standing_rows(evaluation: Evaluation) -> Table:
    rows: Table = []
    for standing in _ranked(evaluation):
        less = standing.router_less_this.get("mdp_auccc", _NOTHING)
        # A single target has no curve, and says nothing of a prompt.
        figures_shown = _AT_ONE_TOLERANCE if standing.is_single else _STANDING
        cells = [with_interval(standing.intervals[name], style) for name, style in figures_shown]
        cells += ["–"] * (len(_STANDING) - len(cells))
        rows.append([standing.title, *cells, "–" if standing.is_single else with_interval(less, "+m")])
    return rows


def _ranked(evaluation: Evaluation) -> list[Standing]:
    """The router, the baselines by what they add, the single targets by accuracy, the oracle."""
    router, *others = evaluation.standings
    baselines = evaluation.baselines
    singles = [s for s in others if s not in baselines and not s.has_hindsight]
    return [
        router,
        *sorted(baselines, key=lambda s: -s.scores.mdp_auccc),
        *sorted(singles, key=lambda s: -s.scores.accuracy),
        *(s for s in others if s.has_hindsight),
    ]


_NOTHING = Interval(*[float("nan")] * 3)
_AT_ONE_TOLERANCE = [("accuracy", "%"), ("cost", "$"), ("efficacy", "%"), ("cost_saving", "%")]
_STANDING = [
    *_AT_ONE_TOLERANCE,
    ("saving_at_best_single", "%"),
    ("mdp_auccc", "m"),
    ("mean_auc", ".3f"),
]


def _operating_row(point: OperatingPoint) -> list[Cell]:
    return [
        point.title,
        shown(point.tolerance, ".3f"),
        with_interval(point.accuracy, "%"),
        with_interval(point.cost, "$"),
        with_interval(point.efficacy, "%"),
        with_interval(point.saving_against_best_single, "%"),
        with_interval(point.saving_against_dearest, "%"),
    ]


def _target_rows(evaluation: Evaluation) -> Table:
    scores, calibration = evaluation.router, evaluation.calibration
    columns = [
        (evaluation.target_accuracy, "%"),
        (evaluation.target_cost, "$"),
        (scores.share, "%"),
        (scores.auc, ".3f"),
        (calibration.ece, ".3f"),
        (calibration.ece_uncalibrated, ".3f"),
        (calibration.ece_of_chance, ".3f"),
        (scores.brier, ".3f"),
    ]
    return [
        [target, *(shown(values[i], style) for values, style in columns)] for i, target in enumerate(evaluation.targets)
    ]


def _peer_rows(evaluation: Evaluation) -> Table:
    is_shown = [s for s in _ranked(evaluation) if not s.is_single]
    return [[s.title, *(with_interval(s.intervals[name], style) for name, style in _PEERS)] for s in is_shown]


_PEERS = [("apgr", ".3f"), ("cpt_50", "%"), ("cpt_80", "%"), ("aiq", ".3f"), ("arena_score", ".3f"), ("aurc", ".3f")]


def _zones(router: RoutingScores) -> list[str]:
    return [shown(value, "%") for value in (router.all_right, router.disagree, router.all_wrong, router.wrong_choices)]


def _missing(evaluation: Evaluation) -> str | None:
    """How missing outcomes were dealt with, where there are any."""
    num_incomplete = evaluation.num_held_out - evaluation.num_complete
    if not num_incomplete:
        return None
    return (
        f"{num_incomplete:,} prompts lack an outcome of some target. Complete prompts stand for them, in proportion "
        "within each fifth of difficulty, as the router has it: unbiased where, among prompts as difficult, what is "
        f"missing does not depend on what came of it. Without that, the router's accuracy would read "
        f"{shown(evaluation.accuracy_of_complete, '%')} in place of {shown(evaluation.router.accuracy, '%')}."
    )


def with_interval(figure: Interval, style: str) -> Cell:
    """A cell of a table; without an interval where the figure has none."""
    value, low, high = figure
    if not isfinite(low):
        return shown(value, style)
    return shown(value, style), f"{shown(low, style)} to {shown(high, style)}"


def in_words(figure: Interval, style: str) -> str:
    """A figure in a sentence, its interval in brackets."""
    cell = with_interval(figure, style)
    return cell if isinstance(cell, str) else f"{cell[0]} ({cell[1]})"


def shown(value: float, style: str) -> str:
    """A figure as text: `%`, `$` of a prompt's cost for a thousand of them, `m` in thousandths, or a format."""
    if not isfinite(value):
        return "–"
    if style == "$":
        return usd(1e3 * value)
    value = 0.0 if abs(value) < 5e-7 else value  # never "-0.0%"
    if style in ("m", "+m"):
        return format(1e3 * value, f"{style[:-1]}.1f")
    return {"%": f"{value:.1%}", "+%": f"{value:+.1%}"}.get(style) or format(value, style)
