"""The picture of a label report: the curve of tolerances, the choice on it, and every single target."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from prefill_router.reports.figures import NARROW, WIDE, log_costs_figure, to_svg
from prefill_router.reports.log_costs import LogCosts

CURVE = [(3.0, 0.9), (2.6, 0.89), (2.0, 0.85), (1.0, 0.7)]
TOLERANCES = {0.0: CURVE[0], 0.05: CURVE[2], 1.0: CURVE[3]}


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_shows_the_choice_and_every_target(width: float) -> None:
    singles = {"big": (4.0, 0.91), "x < y": (1.0, 0.7)}
    figure = log_costs_figure(LogCosts((2.5, 0.88), CURVE, TOLERANCES, singles, "tolerance 0.020"), width)
    (axes,) = figure.axes
    curve, shown, choice, big, other, *_ = axes.lines
    assert curve.get_xydata().tolist() == [list(point) for point in CURVE]
    assert shown.get_xydata().tolist() == [[3.0, 0.9], [2.0, 0.85], [1.0, 0.7]]
    assert choice.get_xydata().tolist() == [[2.5, 0.88]]
    assert [line.get_xydata().tolist() for line in (big, other)] == [[[4.0, 0.91]], [[1.0, 0.7]]]
    assert axes.get_xscale() == "log"
    svg = to_svg(figure)
    for text in ("tolerance 0.050: $2.00", "tolerance 0.020: $2.50", "x &lt; y: $1.00"):
        assert f'aria-label="{text}, expected accuracy ' in svg


def test_a_log_that_costs_nothing_has_a_linear_axis() -> None:
    figure = log_costs_figure(
        LogCosts((0.0, 0.9), [(0.0, 0.9)], {0.0: (0.0, 0.9)}, {"free": (0.0, 0.9)}, "budget"), WIDE
    )
    assert figure.axes[0].get_xscale() == "linear"
    to_svg(figure)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("span", [1.6, 12.0, 400.0, 3e5])
def test_no_label_covers_another(width: float, span: float) -> None:
    dear = 0.013 * span
    singles = {
        "google/gemini-2.5-pro": (dear, 0.93),
        "openai/gpt-5.4-mini": (0.97 * dear, 0.925),
        "anthropic/claude-sonnet": (0.94 * dear, 0.928),
        "mistralai/mistral-large-2512": (0.1 * dear + 0.0117, 0.85),
        "meta-llama/llama-3.1-8b-instruct": (0.013, 0.7),
    }
    costs = [float(cost) for cost in np.geomspace(0.013, dear, 30)]
    curve = [(cost, 0.7 + 0.24 * i / 29) for i, cost in enumerate(costs)][::-1]
    figure = log_costs_figure(LogCosts(curve[3], curve, {0.0: curve[0]}, singles, "tolerance 0.020"), width)
    to_svg(figure)
    (axes,) = figure.axes
    names = [text.get_window_extent() for text in axes.texts]
    low, high = axes.get_xlim()
    ticks = [
        label.get_window_extent()
        for value, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= value <= high
    ]
    assert len(names) == 5
    assert len(ticks) >= 1
    for boxes in (names, ticks):
        assert not [a for a, b in combinations(boxes, 2) if a.overlaps(b)]
    assert all(axes.bbox.x0 - 1 <= name.x0 and name.x1 <= figure.bbox.x1 + 1 for name in names)
