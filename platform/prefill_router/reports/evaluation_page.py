"""The evaluation report: one self-contained HTML page with a summary, tables and plots, for screens and print."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import jinja2
import numpy as np

from prefill_router import storage
from prefill_router.common.console import doing
from prefill_router.evaluation.learning_curve import TIMES, LearnedFigure, LearningCurve
from prefill_router.evaluation.results import WITHOUT, Evaluation, Standing
from prefill_router.metrics import Interval, RoutingScores
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS
from prefill_router.probe.layer_scores import LayerProbe
from prefill_router.reports.number_format import Table, exactly, in_words, once, shown, with_interval
from prefill_router.reports.verdict import best_single, verdict

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prefill_router.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def render_html(evaluation: Evaluation, probes: Sequence[LayerProbe] | None = None, notice: str | None = None) -> str:
    """The report as one page, with `notice` at its top."""
    from prefill_router.reports import figures  # imports matplotlib, which is slow to load

    plots = {
        "curve": figures.in_both_widths(figures.curve_figure, evaluation),
        "differences": figures.in_both_widths(figures.differences_figure, evaluation),
        "shares": figures.in_both_widths(figures.shares_figure, evaluation),
        "risk": figures.in_both_widths(figures.risk_figure, evaluation),
        "reliability": figures.in_both_widths(figures.reliability_figure, evaluation),
    }
    curve = evaluation.learning
    if curve and not curve.silence:
        plots["learning"] = figures.in_both_widths(figures.learning_figure, curve)
    if probes:
        plots["probe"] = figures.in_both_widths(figures.probe_figure, probes)
    operating = once(_operating_heads(evaluation), _operating_rows(evaluation), *_SAVED)
    targets = once(_target_heads(evaluation), _target_rows(evaluation), *_ECE)
    return TEMPLATES.get_template("report.html").render(
        title=f"Routing report: {evaluation.pool}",
        about=evaluation.about,
        e=evaluation,
        notice=notice,
        headline=headline(evaluation),
        verdict=verdict(evaluation),
        against_baselines=against_baselines(evaluation),
        encoders=encoders_line(evaluation),
        plots=plots,
        standing_heads=_standing_heads(evaluation),
        standings=_standing_rows(evaluation),
        operating_heads=operating[0],
        operating_points=operating[1],
        target_heads=targets[0],
        targets=targets[1],
        peers=_peer_rows(evaluation),
        missing=_missing(evaluation),
        costs=costs_line(evaluation),
        uncalibrated=_uncalibrated(evaluation),
        outlook=curve and outlook(curve),
        learning_caption=learning_caption(curve) if curve and "learning" in plots else "",
    )


@doing("writing the report")
def write(
    uri: str, evaluation: Evaluation, probes: Sequence[LayerProbe] | None = None, notice: str | None = None
) -> None:
    """Writes report.json and report.html below `uri`."""
    storage.write_json(storage.join(uri, "report.json"), evaluation.to_json())
    storage.write_bytes(storage.join(uri, "report.html"), render_html(evaluation, probes, notice).encode())


def headline(evaluation: Evaluation) -> str:
    """A sentence that compares the router's accuracy and cost with those of the best single target.

    It does not promise a saving where the verdict is to use that target alone.
    """
    router, point = evaluation.router, evaluation.operating_points[0]
    saving = point.saving_against_best_single
    saved = f": {in_words(saving, '%')} saved" if isfinite(saving.value) else ""
    if saving.value > 0.0 and verdict(evaluation).tolerance is None:
        saved += ", but these prompts do not show that it pays"
    if saving.value < 0.0:
        saved = f": {in_words(saving.negated, '%')} more"
    if saving.value <= -1.0:
        times = Interval(1.0 - saving.value, 1.0 - saving.high, 1.0 - saving.low)
        saved = f": {in_words(times, '.1f')} times as much"
    achieved = in_words(point.accuracy, "%")
    achieved = f"The mean reward is {achieved}" if evaluation.is_judged else f"{achieved} of the answers are right"
    return (
        f"{achieved} at {shown(router.cost, '$')} per 1,000 prompts, "
        f"compared with {shown(router.best_single_accuracy, '%')} at {shown(router.best_single_cost, '$')} for "
        f"{best_single(evaluation)}, the best single target{saved}."
    )


def against_baselines(evaluation: Evaluation) -> str:
    """Two sentences that compare the router with all baselines, and with the one of highest MDP-AUCCC."""
    baselines = evaluation.baselines
    if not baselines:
        return "No baseline could be fitted on these data."
    best = max(baselines, key=lambda baseline: baseline.scores.mdp_auccc)
    num_beaten = sum(baseline.router_less_this["mdp_auccc"].low > 0.0 for baseline in baselines)
    less = best.router_less_this["mdp_auccc"]
    return (
        f"Over all tolerances, the router adds significantly more than {num_beaten} of {len(baselines)} baselines. "
        f"Against the best baseline, {best.title}, {_compared(less)}: MDP-AUCCC x 1000, the area that routing adds to "
        f"the single targets' cost-accuracy frontier, differs by {in_words(less, '+m')}."
    )


def neighbours_line(neighbours: Standing) -> str:
    """Sentences on what the baseline of k nearest neighbours is, and whether the router is better."""
    less = neighbours.router_less_this["mdp_auccc"]
    return (
        "k nearest neighbours is a baseline: it expects of each target what it achieved on the most similar training "
        f"prompts. Over all tolerances, {_compared(less)}: MDP-AUCCC x 1000 differs by {in_words(less, '+m')}, and the "
        f"95 % interval {'excludes' if _is_significant(less) else 'includes'} 0."
    )


def _compared(less: Interval) -> str:
    if not _is_significant(less):
        return "the difference is not significant"
    return f"the router is {'better' if less.low > 0.0 else 'worse'}"


def _is_significant(less: Interval) -> bool:
    return less.low > 0.0 or less.high < 0.0


def encoders_line(evaluation: Evaluation) -> str | None:
    """A sentence on what each encoder of a router adds; None for a router with a single one."""
    added = [
        f"{standing.title.removeprefix(WITHOUT)} adds {in_words(standing.router_less_this['mdp_auccc'], '+m')}"
        for standing in evaluation.reduced
    ]
    return f"Of the router's encoders, in MDP-AUCCC x 1000: {'; '.join(added)}." if added else None


def calibration_line(evaluation: Evaluation) -> str:
    """The mean expected calibration error, and how calibration changed it."""
    calibration = evaluation.calibration
    ece, before = (float(np.nanmean(values)) for values in (calibration.ece, calibration.ece_uncalibrated))
    effect = "calibration changed nothing" if all(calibration.unchanged) else f"{before:.3f} before calibration"
    return f"mean ECE {ece:.3f}: {effect}"


def costs_line(evaluation: Evaluation) -> str:
    """A sentence that says which share of the costs was billed, and how the others were computed."""
    share = evaluation.billed_share
    computed = "computed from the pool's prices and the actual answer lengths"
    if not evaluation.has_lengths:
        computed = (
            "computed from the pool's prices and an assumed length, since no answer's length is known: they are rough"
        )
    if share in (0.0, 1.0):
        return f"The costs shown are {'as billed' if share else computed}."
    return f"{shown(share, '%')} of the answers are counted as billed; the costs of the others are {computed}."


def _uncalibrated(evaluation: Evaluation) -> str:
    """The names of the targets whose P(correct) calibration left unchanged."""
    pairs = zip(evaluation.targets, evaluation.calibration.unchanged, strict=True)
    return ", ".join(target for target, is_unchanged in pairs if is_unchanged)


def outlook(curve: LearningCurve) -> str:
    """Sentences on the expected gain from more outcomes, or the reason why it cannot be estimated."""
    if curve.silence:
        return f"Not available: {curve.silence}."
    sentences = [_outlook(learned, *_LEARNED[name]) for name, learned in curve.figures.items()]
    if TIMES[-1] * curve.sizes[-1] > MAX_LANDMARKS:
        sentences.append(f"The router's kernel machine uses at most {MAX_LANDMARKS:,} prompts, and may gain less.")
    return " ".join(sentences)


def learning_caption(curve: LearningCurve) -> str:
    """The numbers of prompts that the learning curve is measured on."""
    *smaller, (whole, _) = zip(curve.sizes, curve.num_subsets, strict=True)
    parts = ", ".join(f"{num_subsets} of {size:,}" for size, num_subsets in smaller)
    return (
        f"Trained on all {whole:,} training prompts and on disjoint subsets of them ({parts}), and scored on "
        f"{curve.num_held_out:,} held-out prompts."
    )


def _outlook(learned: LearnedFigure, title: str, style: str) -> str:
    if learned.silence:
        return f"The gain in {title} cannot be estimated: {learned.silence}."
    twice, four_times = (
        f"{outlook.num_prompts:,} training prompts ({times} as many) should change {title} by "
        f"{in_words(outlook.gain, style)}"
        for outlook, times in zip(learned.outlooks, ("twice", "four times"), strict=True)
    )
    return f"{twice}; {four_times}."


_LEARNED = {"mean_auc": ("mean AUC", "+.3f"), "mdp_auccc": ("MDP-AUCCC x 1000", "+m")}


def metric_rows(scores: RoutingScores, quality: str = "accuracy") -> list[tuple[str, str]]:
    """The routing metrics of one router, as (name, text). `quality` is the word for the mean outcome."""
    return [
        (title.replace("accuracy", quality), shown(getattr(scores, name), style)) for title, name, style in _METRICS
    ]


_METRICS: list[tuple[str, str, str]] = [
    ("accuracy", "accuracy", "%"),
    ("cost per 1,000 prompts", "cost", "$"),
    ("efficacy (gap closed)", "efficacy", "%"),
    ("saving against the most expensive target", "cost_saving", "%"),
    ("saving at the best single target's accuracy", "saving_at_best_single", "%"),
    ("efficacy at the most accurate tolerance", "best_efficacy", "%"),
    ("P-AUCCC", "p_auccc", ".4f"),
    ("MDP-AUCCC (added by routing)", "mdp_auccc", ".4f"),
    ("PDP-AUCCC (left by the router)", "pdp_auccc", ".4f"),
]


def paired_rows(standing: Standing, quality: str = "accuracy") -> list[tuple[str, str]]:
    """The differences between the evaluated router and this contender, with intervals, as (name, text)."""
    differences = standing.router_less_this
    return [(title.replace("accuracy", quality), in_words(differences[name], style)) for title, name, style in _PAIRED]


_PAIRED = [
    ("accuracy, each at its own tolerance", "accuracy", "+%"),
    ("cost per 1,000 prompts", "cost", "$"),
    ("MDP-AUCCC x 1000", "mdp_auccc", "+m"),
    ("mean AUC", "mean_auc", "+.4f"),
    ("mean Brier score", "mean_brier", "+.4f"),
]


# --- tables ----------------------------------------------------------------------------------------------------------


_SAVED = ("saved vs best single target", "saved vs most expensive target")
_ECE = ("ECE", "ECE before calibration")


def _operating_heads(evaluation: Evaluation) -> list[str]:
    return ["operating point", "tolerance", evaluation.quality, "cost per 1,000 prompts", "gap closed", *_SAVED]


def _standing_heads(evaluation: Evaluation) -> list[str]:
    at_one_tolerance = [evaluation.quality, "cost per 1,000 prompts", "gap closed", "saved vs most expensive target"]
    over_all = [f"saved at best single {evaluation.quality}", "MDP-AUCCC x 1000", "mean AUC"]
    return ["", *at_one_tolerance, *over_all, "MDP-AUCCC x 1000, router minus this"]


def _target_heads(evaluation: Evaluation) -> list[str]:
    figures_shown = ["share of prompts", "AUC", *_ECE, "ECE if perfectly calibrated", "Brier score"]
    return ["target", evaluation.quality, "cost per 1,000 prompts", *figures_shown]


def _standing_rows(evaluation: Evaluation) -> Table:
    rows: Table = []
    for standing in _ranked(evaluation):
        less = standing.router_less_this.get("mdp_auccc", _NOTHING)
        # A single target has no curve and no discrimination between prompts.
        figures_shown = _AT_ONE_TOLERANCE if standing.is_single else _STANDING
        cells = [with_interval(standing.intervals[name], style) for name, style in figures_shown]
        cells += ["–"] * (len(_STANDING) - len(cells))
        rows.append([standing.title, *cells, "–" if standing.is_single else with_interval(less, "+m")])
    return rows


def _ranked(evaluation: Evaluation) -> list[Standing]:
    """The router, with and without each encoder, baselines by MDP-AUCCC, single targets by accuracy, and the oracle."""
    router, *others = evaluation.standings
    baselines = evaluation.baselines
    singles = [s for s in others if s.is_single]
    return [
        router,
        *evaluation.reduced,
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


def _operating_rows(evaluation: Evaluation) -> Table:
    names = ("accuracy", "cost", "efficacy", "saving_against_best_single", "saving_against_dearest")
    return [
        [
            point.title,
            exactly(point.tolerance),
            *(with_interval(getattr(point, name), "$" if name == "cost" else "%") for name in names),
        ]
        for point in evaluation.operating_points
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


def _missing(evaluation: Evaluation) -> str | None:
    """How missing outcomes were handled; None if there are none."""
    num_incomplete = evaluation.num_held_out - evaluation.num_complete
    if not num_incomplete:
        return None
    weighted, others = (shown(x, "%") for x in (evaluation.router.accuracy, evaluation.accuracy_of_complete))
    return (
        f"{num_incomplete:,} prompts lack an outcome for at least one target. Complete prompts are weighted to "
        "represent them within each fifth of predicted difficulty, which is unbiased if, among equally difficult "
        "prompts, missing outcomes do not depend on correctness. Without the weights, the router's "
        f"{evaluation.quality} would be {others} instead of {weighted}."
    )


TEMPLATES.filters["shown"] = shown
TEMPLATES.filters["exactly"] = exactly
