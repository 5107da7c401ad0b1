"""The picture of a label report: the curve of tolerances, the choice on it, and every single target."""

from __future__ import annotations

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
