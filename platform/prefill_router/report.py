"""Plots and the HTML report: one self-contained page, its plots inline as SVG, nothing fetched from anywhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil, isfinite

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefill_router.evaluation import Evaluation
from prefill_router.metrics import RoutingScores, pareto_frontier
from prefill_router.probe import LayerProbe, by_encoder, choose

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prefill_router"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_COLOURS = ["#3b6fb6", "#d1603d", "#3f9b6c", "#8a5fb0", "#b58a1b", "#4aa3b5", "#b0507f", "#6b7280"]
_LINE = {"last": "-", "mean": "--"}


def probe_figure(probes: Sequence[LayerProbe]) -> Figure:
    """Fisher J (bias-corrected) and d_eff by layer: a line for each target and pooling, a dot at each chosen layer.

    Each encoder has a row of its own.
    """
    encoders = by_encoder(probes)
    figure = Figure(figsize=(10, 4.2 * len(encoders)), layout="constrained")
    panels = figure.subplots(len(encoders), 2, squeeze=False)
    chosen = list(choose(probes).values())
    for (encoder, rows), (fisher_axes, d_eff_axes) in zip(encoders.items(), panels, strict=True):
        of_encoder = f" by {encoder}" if len(encoders) > 1 else ""
        _plot_fisher(fisher_axes, rows, chosen)
        _plot_d_eff(d_eff_axes, rows)
        _label(fisher_axes, f"Fisher separability{of_encoder}", "layer", "J, bias-corrected")
        _label(d_eff_axes, f"Effective dimensionality{of_encoder}", "layer", "d_eff")
        d_eff_axes.set_yscale("log")
    return figure


def _plot_fisher(axes: Axes, probes: Sequence[LayerProbe], chosen: Sequence[LayerProbe]) -> None:
    poolings = list(dict.fromkeys(p.column.pooling for p in probes))
    for i, target in enumerate(dict.fromkeys(p.target for p in probes)):
        colour = _COLOURS[i % len(_COLOURS)]
        for pooling in poolings:
            rows = sorted((p for p in probes if (p.target, p.column.pooling) == (target, pooling)), key=_layer)
            # A leading underscore would hide the name from the legend.
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
        # A constant column, such as the embedding of the last token, has none, and a log axis no place for it.
        varying = [p for p in rows if p.d_eff > 0]
        axes.plot(
            list(map(_layer, varying)), [p.d_eff for p in varying], _LINE[pooling], color="#374151", label=pooling
        )


def _layer(probe: LayerProbe) -> int:
    return probe.column.layer


def curve_figure(evaluation: Evaluation) -> Figure:
    """Cost against accuracy: the routers' curves, every single target, their frontier, the oracle."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    singles = list(zip(evaluation.target_cost, evaluation.target_accuracy, strict=True))
    axes.axhline(evaluation.router.oracle_accuracy, color="#9ca3af", ls=":", lw=1.2, label="oracle")
    frontier = pareto_frontier(singles)
    axes.plot(frontier[:, 0], frontier[:, 1], "--", color="#9ca3af", lw=1.2, label="single targets, frontier")
    names = {"router": ("prefill router", _COLOURS[0], 2.2), "knn": ("k nearest neighbours", _COLOURS[1], 1.4)}
    for key, points in evaluation.curves.items():
        label, colour, width = names[key]
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, lw=width, label=label)
    axes.plot(
        evaluation.router.cost,
        evaluation.router.accuracy,
        "*",
        color=_COLOURS[0],
        ms=13,
        label="router's own tolerance",
    )
    for target, (cost, accuracy) in zip(evaluation.targets, singles, strict=True):
        axes.plot(cost, accuracy, "o", color="#374151", ms=5)
        axes.annotate(
            target, (cost, accuracy), textcoords="offset points", xytext=(6, -10), fontsize=8, parse_math=False
        )
    if min(evaluation.target_cost) > 0.0:  # a log axis has no place for a free target
        axes.set_xscale("log")
    _label(axes, "Cost and accuracy on held-out prompts", "mean cost, USD a prompt", "accuracy")
    return figure


def reliability_figure(evaluation: Evaluation) -> Figure:
    """How often a target was right against what was said of it: a panel a target, before calibration and after.

    A dot is a bin of predictions, larger where it holds more prompts.
    """
    num_targets = len(evaluation.targets)
    num_columns = min(num_targets, 5)
    num_rows = ceil(num_targets / num_columns)
    figure = Figure(figsize=(2.0 * max(num_columns, 2), 2.3 * num_rows + 0.5), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).ravel()
    errors = list(zip(evaluation.ece_uncalibrated, evaluation.router.ece, strict=True))
    for i, (axes, target) in enumerate(zip(panels, evaluation.targets, strict=False)):
        axes.plot([0, 1], [0, 1], ":", color="#9ca3af", lw=1.2)
        for name, label, line, colour in _RELIABILITY:
            rows = evaluation.reliability[name][i]
            said, observed = [row[0] for row in rows], [row[1] for row in rows]
            most = max((row[2] for row in rows), default=1.0)
            axes.plot(said, observed, line, color=colour, lw=1.2, label=label)
            axes.scatter(said, observed, [3.0 + 25.0 * row[2] / most for row in rows], color=colour)
        before, after = (_shown(error, ".3f") for error in errors[i])
        axes.set_title(f"{target}\nECE {before} to {after}", fontsize=8, parse_math=False)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[num_targets:]:
        axes.set_visible(False)
    figure.supxlabel("P(correct) as said", fontsize=8)
    figure.supylabel("share that was right", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8, frameon=False
    )
    return figure


_RELIABILITY = [("uncalibrated", "before calibration", "--", "#9ca3af"), ("calibrated", "after", "-", _COLOURS[0])]


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)


def to_svg(figure: Figure) -> str:
    """The figure as an inline <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def render_html(evaluation: Evaluation, probes: Sequence[LayerProbe] | None = None, notice: str | None = None) -> str:
    """The report as one page; `notice` stands on top of it."""
    scores = {"prefill router": evaluation.router}
    if evaluation.knn is not None:
        scores["k nearest neighbours"] = evaluation.knn
    return _TEMPLATES.get_template("report.html").render(
        e=evaluation,
        notice=notice,
        rows={title: [_shown(getattr(s, name), style) for s in scores.values()] for title, name, style in _METRICS},
        routers=list(scores),
        curve=to_svg(curve_figure(evaluation)),
        reliability=to_svg(reliability_figure(evaluation)),
        probe=to_svg(probe_figure(probes)) if probes else None,
        targets=_target_rows(evaluation),
        headline=headline(evaluation),
        length_errors=[
            _shown(error, ".0f")
            for error in (evaluation.length_error_tokens, evaluation.length_error_median_rule_tokens)
        ],
    )


def headline(evaluation: Evaluation) -> str:
    """One sentence: what the router costs and answers, against the best single target."""
    router = evaluation.router
    ranked = zip(
        evaluation.target_accuracy, (-cost for cost in evaluation.target_cost), evaluation.targets, strict=True
    )
    best = max(ranked, key=lambda single: single[:2])[2]
    saved = f": {1.0 - router.cost / router.best_single_cost:+.1%} saved" if router.best_single_cost else ""
    return (
        f"{_shown(router.accuracy, '%')} right at {_shown(router.cost, '$')} a prompt, against "
        f"{_shown(router.best_single_accuracy, '%')} at {_shown(router.best_single_cost, '$')} "
        f"for always {best}{saved}."
    )


def _target_rows(evaluation: Evaluation) -> list[list[str]]:
    scores = evaluation.router
    columns = [
        (evaluation.target_accuracy, "%"),
        (evaluation.target_cost, "$"),
        (scores.auc, ".3f"),
        (scores.ece, ".3f"),
        (evaluation.ece_uncalibrated, ".3f"),
        (scores.brier, ".3f"),
    ]
    return [
        [target, *(_shown(values[i], style) for values, style in columns)]
        for i, target in enumerate(evaluation.targets)
    ]


def _shown(value: float, style: str) -> str:
    if not isfinite(value):
        return "–"
    return {"%": f"{value:.1%}", "$": f"${value:.3g}"}.get(style) or format(value, style)


_METRICS: list[tuple[str, str, str]] = [
    ("accuracy", "accuracy", "%"),
    ("cost a prompt", "cost", "$"),
    ("efficacy (gap closed)", "efficacy", "%"),
    ("saving against the dearest target", "cost_saving", "%"),
    ("saving at the best single target's accuracy", "saving_at_best_single", "%"),
    ("efficacy at the most accurate tolerance", "best_efficacy", "%"),
    ("P-AUCCC", "p_auccc", ".4f"),
    ("MDP-AUCCC (what routing adds)", "mdp_auccc", ".4f"),
    ("PDP-AUCCC (what it leaves)", "pdp_auccc", ".4f"),
]


def metric_rows(scores: RoutingScores) -> list[tuple[str, str]]:
    """The routing metrics of one router, as (name, text)."""
    return [(title, _shown(getattr(scores, name), style)) for title, name, style in _METRICS]
