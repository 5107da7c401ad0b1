"""Matplotlib figures of layer probes and evaluations, each in a desktop and a phone width."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

from prefill_router.common.money import usd
from prefill_router.evaluation.learning_curve import LearningCurve
from prefill_router.evaluation.results import Evaluation
from prefill_router.metrics import pareto_frontier
from prefill_router.probe.layer_scores import LayerProbe, by_encoder, choose
from prefill_router.reports.log_costs import LogCosts
from prefill_router.reports.number_format import exactly
from prefill_router.reports.point_names import name_points
from prefill_router.reports.tooltips import add_tip, make_room, with_tips

_COLOURS = ["#3b6fb6", "#d1603d", "#3f9b6c", "#8a5fb0", "#b58a1b", "#4aa3b5", "#b0507f", "#6b7280"]
_BEST_BASELINES = ["#d1603d", "#3f9b6c", "#8a5fb0"]  # colours of the best; the other baselines are grey
_GREY, _INK = "#9ca3af", "#374151"
_LINE = {"last": "-", "mean": "--", "sentence": "x"}  # the embedding of a sentence encoder is a point

WIDE, NARROW = 8.6, 4.4  # inches, for desktop and phone
_MAX_NARROW = 6.0
_SUBS = ((1.0, 2.0, 3.0, 5.0, 7.0), (1.0, 3.0))  # ticks in each decade of costs
_TICK_PIXELS = 60.0  # the width of a cost at the size of ticks, and a gap


def probe_figure(probes: Sequence[LayerProbe], width: float = 10.0) -> Figure:
    """Bias-corrected Fisher J and d_eff by layer, one row of panels per encoder.

    There is one line per target and pooling; dots mark the chosen layers.
    """
    encoders = by_encoder(probes)
    is_wide = width > _MAX_NARROW
    num_rows = len(encoders) if is_wide else 2 * len(encoders)
    figure = Figure(figsize=(width, (4.2 if is_wide else 3.4) * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 2 if is_wide else 1, squeeze=False).reshape(-1, 2)
    chosen = list(choose(probes).values())
    for (encoder, rows), (fisher_axes, d_eff_axes) in zip(encoders.items(), panels, strict=True):
        of_encoder = f" by {encoder}" if len(encoders) > 1 else ""
        _plot_fisher(fisher_axes, rows, chosen)
        _plot_d_eff(d_eff_axes, rows)
        _label(fisher_axes, f"Fisher separability{of_encoder}", "layer", "J, bias-corrected", has_legend=True)
        _label(d_eff_axes, f"Effective dimensionality{of_encoder}", "layer", "d_eff", has_legend=True)
        d_eff_axes.set_yscale("log")
    return figure


def _plot_fisher(axes: Axes, probes: Sequence[LayerProbe], chosen: Sequence[LayerProbe]) -> None:
    poolings = list(dict.fromkeys(p.column.pooling for p in probes))
    for i, target in enumerate(dict.fromkeys(p.target for p in probes)):
        colour = _COLOURS[i % len(_COLOURS)]
        for pooling in poolings:
            rows = sorted((p for p in probes if (p.target, p.column.pooling) == (target, pooling)), key=_layer)
            # Matplotlib leaves labels with a leading underscore out of the legend.
            label = f"\u200a{target}" if pooling == poolings[0] else None
            values = [p.fisher_j_corrected for p in rows]
            axes.plot(list(map(_layer, rows)), values, _LINE[pooling], color=colour, label=label, lw=1.4)
            for p in rows:
                if p in chosen:
                    axes.plot(p.column.layer, p.fisher_j_corrected, "o", color=colour, ms=6)


def _plot_d_eff(axes: Axes, probes: Sequence[LayerProbe]) -> None:
    target = probes[0].target
    for pooling in dict.fromkeys(p.column.pooling for p in probes):
        rows = sorted((p for p in probes if (p.target, p.column.pooling) == (target, pooling)), key=_layer)
        # A constant column, such as the embedding of the last token, has d_eff 0, which a log axis cannot show.
        varying = [p for p in rows if p.d_eff > 0]
        axes.plot(list(map(_layer, varying)), [p.d_eff for p in varying], _LINE[pooling], color=_INK, label=pooling)


def _layer(probe: LayerProbe) -> int:
    return probe.column.layer


def curve_figure(evaluation: Evaluation, width: float) -> Figure:
    """Accuracy by cost: the router's curve with its interval, baselines, single targets and the oracle."""
    figure = Figure(figsize=(width, 5.0 if width > _MAX_NARROW else 5.6), layout="constrained")
    make_room(figure)
    axes = figure.subplots()
    router = evaluation.standings[0]
    singles = _per_1000(zip(evaluation.target_cost, evaluation.target_accuracy, strict=True))
    axes.axhline(router.scores.oracle_accuracy, color=_GREY, ls=":", lw=1.2, label="oracle")
    frontier = pareto_frontier(singles)
    axes.plot(frontier[:, 0], frontier[:, 1], "--", color=_GREY, lw=1.2, label="single targets, frontier")
    ranked = sorted(evaluation.baselines, key=lambda baseline: -baseline.scores.mdp_auccc)
    for i, baseline in enumerate(ranked):
        is_best = i < len(_BEST_BASELINES)
        colour, label = (_BEST_BASELINES[i], baseline.title) if is_best else ("#d1d5db", None)
        axes.plot(*zip(*_per_1000(baseline.curve), strict=True), color=colour, lw=1.1, label=label)
    if len(ranked) > len(_BEST_BASELINES):
        axes.plot([], [], color="#d1d5db", label="other baselines")
    costs, low, high = zip(*_per_1000(evaluation.band), strict=True)
    axes.fill_between(costs, low, high, color=_COLOURS[0], alpha=0.15, lw=0)
    axes.plot(
        *zip(*_per_1000(router.curve), strict=True), color=_COLOURS[0], lw=2.4, label=f"{router.title}, 95 % interval"
    )
    own = (1000.0 * router.scores.cost, router.scores.accuracy)
    axes.plot(*own, "*", color=_COLOURS[0], ms=14, mec="white", label="default tolerance of the router")
    for cost, accuracy in singles:
        axes.plot(cost, accuracy, "o", color=_INK, ms=5)
    axes.margins(x=0.14, y=0.08)
    _label(axes, "", "cost per 1,000 prompts", evaluation.quality)
    _money_axis(axes, is_log=min(evaluation.target_cost) > 0.0)
    _tips(axes, evaluation)
    legend = figure.legend(loc="outside lower center", ncols=3 if width > _MAX_NARROW else 1, fontsize=8, frameon=False)
    _plain(legend.get_texts())
    name_points(figure, axes, dict(zip(evaluation.targets, singles, strict=True)), _per_1000(router.curve))
    return figure


def _per_1000(rows: Iterable[Sequence[float]]) -> list[Any]:
    """The rows with their first column, a cost per prompt, for 1,000 prompts."""
    return [(1000.0 * cost, *others) for cost, *others in rows]


def _tips(axes: Axes, evaluation: Evaluation) -> None:
    def tip(name: str, cost: float, quality: float) -> None:
        text = f"{name}: {usd(1000.0 * cost)} per 1,000 prompts, {evaluation.quality} {quality:.1%}"
        add_tip(axes, 1000.0 * cost, quality, text)

    for tolerance, cost, quality in evaluation.tolerances:
        tip(f"tolerance {exactly(tolerance)}", cost, quality)
    tip(f"default tolerance {exactly(evaluation.tolerance)}", evaluation.router.cost, evaluation.router.accuracy)
    for single in zip(evaluation.targets, evaluation.target_cost, evaluation.target_accuracy, strict=True):
        tip(*single)


def _money_axis(axes: Axes, *, is_log: bool) -> None:
    """Shows costs on the x axis as everywhere; a log axis cannot show what is free."""
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(_cost_ticks(axes))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda cost, _: usd(cost))


def _cost_ticks(axes: Axes) -> LogLocator:
    """The most ticks of a log axis whose labels have room."""
    low, high = axes.get_xlim()
    room = np.log10(high / low) * _TICK_PIXELS / axes.bbox.width  # of one label, in decades
    subs = next((subs for subs in _SUBS if np.diff(np.log10([*subs, 10.0])).min() >= room), (1.0,))
    return LogLocator(subs=subs, numticks=max(2, int(axes.bbox.width / _TICK_PIXELS)))


def log_costs_figure(costs: LogCosts, width: float) -> Figure:
    """Expected accuracy by the cost of a log: the router's tolerances, its choice, and each single target."""
    figure = Figure(figsize=(width, 4.2 if width > _MAX_NARROW else 4.6), layout="constrained")
    make_room(figure)
    axes = figure.subplots()
    axes.plot(*zip(*costs.curve, strict=True), color=_COLOURS[0], lw=1.8, label="all tolerances")
    axes.plot(*zip(*costs.tolerances.values(), strict=True), "o", color=_COLOURS[0], ms=4, label="those of the table")
    axes.plot(*costs.chosen, "*", color=_COLOURS[0], ms=14, mec="white", label="this choice")
    for point in costs.singles.values():
        axes.plot(*point, "o", color=_INK, ms=5)
    axes.margins(x=0.14, y=0.08)
    _label(axes, "", "cost of the log", "expected accuracy")
    _money_axis(axes, is_log=min(cost for cost, _ in (costs.chosen, *costs.curve, *costs.singles.values())) > 0.0)
    named = {f"tolerance {exactly(tolerance)}": point for tolerance, point in costs.tolerances.items()}
    for name, (cost, right) in {**named, costs.rule: costs.chosen, **costs.singles}.items():
        add_tip(axes, cost, right, f"{name}: {usd(cost)}, expected accuracy {right:.1%}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    name_points(figure, axes, costs.singles, costs.curve)
    return figure


def differences_figure(evaluation: Evaluation, width: float) -> Figure:
    """The router's paired differences from each baseline in MDP-AUCCC and mean AUC, with intervals."""
    shown, is_wide = evaluation.baselines[::-1], width > _MAX_NARROW
    height = 0.9 + 0.32 * max(len(shown), 1)
    figure = Figure(figsize=(width, height if is_wide else 2 * height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True) if is_wide else figure.subplots(2, 1)
    for axes, (name, title, scale) in zip(panels, _DIFFERENCES, strict=True):
        axes.axvline(0.0, color=_GREY, lw=1.0)
        for i, baseline in enumerate(shown):
            value, low, high = (scale * part for part in baseline.router_less_this[name])
            colour = _COLOURS[0] if low > 0.0 else _COLOURS[1] if high < 0.0 else _GREY
            axes.plot([low, high], [i, i], color=colour, lw=2.0, solid_capstyle="round")
            axes.plot(value, i, "o", color=colour, ms=6)
        axes.set_yticks(range(len(shown)), [baseline.title for baseline in shown], fontsize=8)
        _plain(axes.get_yticklabels())
        axes.set_title(title, fontsize=9, loc="right")
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


_DIFFERENCES = [
    ("mdp_auccc", "MDP-AUCCC x 1000, router minus baseline", 1000.0),
    ("mean_auc", "mean AUC, router minus baseline", 1.0),
]


def shares_figure(evaluation: Evaluation, width: float) -> Figure:
    """The share of prompts that the router and the oracle send to each target."""
    router, oracle = evaluation.standings[0], evaluation.standing("oracle")
    is_shown = [router, *([oracle] if oracle else [])]
    figure = Figure(figsize=(width, 0.8 + 0.42 * len(evaluation.targets)), layout="constrained")
    axes = figure.subplots()
    rows, height = np.arange(len(evaluation.targets))[::-1], 0.8 / len(is_shown)
    for i, (standing, colour) in enumerate(zip(is_shown, (_COLOURS[0], "#cbd5e1"), strict=False)):
        bars = axes.barh(rows + (0.5 * (len(is_shown) - 1) - i) * height, standing.scores.share, height, color=colour)
        axes.bar_label(bars, [f"{share:.0%}" for share in standing.scores.share], fontsize=7, padding=2)
        bars.set_label(standing.title)
    axes.set_yticks(rows, evaluation.targets, fontsize=8)
    _plain(axes.get_yticklabels())
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.margins(x=0.1)
    _label(axes, "", "share of prompts", "", has_legend=True)
    return figure


def risk_figure(evaluation: Evaluation, width: float) -> Figure:
    """The share of wrong answers among the prompts with the highest P(correct), by their share of all prompts."""
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.subplots()
    coverage, risk = zip(*evaluation.risk_coverage, strict=True)
    axes.plot(coverage, risk, color=_COLOURS[0], lw=2.0, label="prefill router")
    axes.axhline(risk[-1], color=_GREY, ls="--", lw=1.0, label="all prompts")
    axes.set_ylim(bottom=0.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{share:.0%}")
    lost = "mean loss of reward" if evaluation.is_judged else "share of wrong answers"
    _label(axes, "", "share of prompts, most confident first", lost, has_legend=True)
    return figure


def reliability_figure(evaluation: Evaluation, width: float) -> Figure:
    """Observed accuracy by predicted P(correct), before and after calibration, in one panel per target.

    A dot is a bin of predictions; its size grows with the number of prompts.
    """
    num_targets, calibration = len(evaluation.targets), evaluation.calibration
    num_columns = min(num_targets, 4 if width > _MAX_NARROW else 2)
    num_rows = ceil(num_targets / num_columns)
    panel = width / max(num_columns, 2)
    figure = Figure(figsize=(width, (panel + 0.35) * num_rows + 0.5), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for i, (axes, target) in enumerate(zip(panels, evaluation.targets, strict=False)):
        axes.plot([0, 1], [0, 1], ":", color=_GREY, lw=1.2)
        for name, label, line, colour in _RELIABILITY:
            rows = calibration.reliability[name][i]
            predicted, observed = [row[0] for row in rows], [row[1] for row in rows]
            most = max((row[2] for row in rows), default=1.0)
            axes.plot(predicted, observed, line, color=colour, lw=1.2, label=label)
            axes.scatter(predicted, observed, [3.0 + 25.0 * row[2] / most for row in rows], color=colour)
        axes.set_title(target, fontsize=8, parse_math=False)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[num_targets:]:
        axes.set_visible(False)
    figure.supxlabel("predicted P(correct)", fontsize=8)
    figure.supylabel(f"observed {evaluation.quality}", fontsize=8)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


_RELIABILITY = [
    ("uncalibrated", "before calibration", "--", _GREY),
    ("calibrated", "after calibration", "-", _COLOURS[0]),
]


def learning_figure(curve: LearningCurve, width: float) -> Figure:
    """Metrics by the number of training prompts, with the power law, dashed where it extrapolates."""
    is_wide = width > _MAX_NARROW
    figure = Figure(figsize=(width, 3.2 if is_wide else 5.6), layout="constrained")
    panels = figure.subplots(1, 2) if is_wide else figure.subplots(2, 1)
    for axes, (name, title, scale) in zip(panels, _LEARNED, strict=True):
        learned = curve.figures[name]
        values, low, high = scale * np.array(learned.measured).T
        axes.vlines(curve.sizes, low, high, color=_INK, lw=1.2)
        axes.plot(curve.sizes, values, "o", color=_INK, ms=5)
        if learned.law:
            numbers, values, low, high = np.array(learned.law).T * np.array([[1.0], *[[scale]] * 3])
            axes.fill_between(numbers, low, high, color=_COLOURS[0], alpha=0.15, lw=0)
            for line, part in (("-", numbers <= curve.sizes[-1]), ("--", numbers >= curve.sizes[-1])):
                axes.plot(numbers[part], values[part], line, color=_COLOURS[0], lw=2.0)
        for outlook in learned.outlooks:
            axes.plot(outlook.num_prompts, scale * outlook.value.value, "o", color=_COLOURS[0], mfc="white", ms=6)
        ticks = [*curve.sizes, *(outlook.num_prompts for outlook in learned.outlooks)]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _label(axes, "", "training prompts", title)
        axes.tick_params(labelsize=8)
    return figure


_LEARNED = [("mean_auc", "mean AUC", 1.0), ("mdp_auccc", "MDP-AUCCC x 1000", 1000.0)]


def _label(axes: Axes, title: str, x: str, y: str, *, has_legend: bool = False) -> None:
    """Labels the axes. A legend stands above them, where no curve is."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if has_legend:
        above = (0.5, 1.1 if title else 1.0)
        legend = axes.legend(loc="lower center", bbox_to_anchor=above, ncols=2, fontsize=8, frameon=False)
        _plain(legend.get_texts())


def _plain(texts: Iterable[Text]) -> None:
    """Turns off math parsing: names may contain dollar signs."""
    for text in texts:
        text.set_parse_math(False)


def in_both_widths(draw: Callable[[Any, float], Figure], data: Any) -> list[str]:
    """The figure of `data` as inline <svg> elements, for desktop and for phone."""
    return [to_svg(draw(data, width), transparent=True) for width in (WIDE, NARROW)]


def to_svg(figure: Figure, *, transparent: bool = False) -> str:
    """The figure as an inline <svg> element; a transparent one for a page that may be dark."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ids"}):  # else they differ from run to run
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=transparent)
    return with_tips(buffer.getvalue()[buffer.getvalue().index("<svg") :])
