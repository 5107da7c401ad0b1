"""The picture of a label report: the curve of tolerances, the choice on it, and every single target."""

from __future__ import annotations

import pytest

from prefill_router.reports.figures import NARROW, WIDE, LogCosts, log_costs_figure, to_svg

TOLERANCES = [(3.0, 0.9), (2.0, 0.85), (1.0, 0.7)]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_shows_the_choice_and_every_target(width: float) -> None:
    figure = log_costs_figure(LogCosts((2.5, 0.88), TOLERANCES, {"big": (4.0, 0.91), "x < y": (1.0, 0.7)}), width)
    (axes,) = figure.axes
    curve, choice, *singles = axes.lines
    assert curve.get_xydata().tolist() == [[1.0, 0.7], [2.0, 0.85], [3.0, 0.9]]
    assert choice.get_xydata().tolist() == [[2.5, 0.88]]
    assert [line.get_xydata().tolist() for line in singles] == [[[4.0, 0.91]], [[1.0, 0.7]]]
    assert axes.get_xscale() == "log"
    assert "x &lt; y" in to_svg(figure)


def test_a_log_that_costs_nothing_has_a_linear_axis() -> None:
    figure = log_costs_figure(LogCosts((0.0, 0.9), [(0.0, 0.9)], {"free": (0.0, 0.9)}), WIDE)
    assert figure.axes[0].get_xscale() == "linear"
    to_svg(figure)
