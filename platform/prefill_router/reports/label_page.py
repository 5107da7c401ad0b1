"""The label report: the expected cost and accuracy of a query log on the router, single targets and logged targets."""

# T targets, K tolerances

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefill_router import storage
from prefill_router.common.console import doing
from prefill_router.common.money import usd
from prefill_router.metrics import spread_by_cost
from prefill_router.policy.pool import Pool
from prefill_router.query_log.aggregates import EVERYTHING, TOLERANCES, Sums, Tally
from prefill_router.query_log.allocation import Allocation
from prefill_router.reports.evaluation_page import TEMPLATES
from prefill_router.reports.log_costs import LogCosts
from prefill_router.reports.number_format import exactly, shown
from prefill_router.reports.versions import versions

_NUM_TOLERANCES = 9
_MAX_ROWS = 60  # of a table: the largest segments; report.json holds all


@dataclass(frozen=True)
class LabelReport:
    router_version: str
    pool: Pool
    tolerance: float
    allocation: Allocation | None
    tally: Tally
    num_quarantined: int
    about: Mapping[str, str]

    @property
    def most_accurate(self) -> int:
        """The target that is expected to be the most accurate, if it alone answered all lines."""
        return int(np.argmax(self.tally.everything["correct"]))

    def to_json(self) -> dict[str, Any]:
        return {
            "router_version": self.router_version,
            "pool": self.pool.model_dump(),
            "tolerance": self.tolerance,
            "allocation": None if self.allocation is None else self.allocation._asdict() | {"gap": self.allocation.gap},
            "num_quarantined": self.num_quarantined,
            "targets": self.pool.target_names,
            "tolerances": list(TOLERANCES),
            "segments": self.tally.to_json(),
            "about": {**self.about, "Versions": versions()},
        }


@doing("writing the report")
def write_report(uri: str, report: LabelReport) -> None:
    """Writes report.json and report.html below `uri`."""
    storage.write_json(storage.join(uri, "report.json"), report.to_json())
    storage.write_bytes(storage.join(uri, "report.html"), render_html(report).encode())


def render_html(report: LabelReport) -> str:
    """The report as one self-contained page."""
    from prefill_router.reports import figures  # imports matplotlib, which is slow to load

    costs = _costs(report)
    return TEMPLATES.get_template("label.html").render(
        title=f"Label report: {report.pool.name}",
        about={**report.about, "Versions": versions()},
        r=report,
        headline=headline(report),
        advice=advice(report),
        budget=_budget(report),
        used=_used(report),
        plot=figures.in_both_widths(figures.log_costs_figure, costs),
        costs=_cost_rows(costs),
        shares_heads=["", "lines", "cost", *report.pool.target_names],
        shares=_segment_tables(report, _share_row),
        drift_heads=["", "lines", "unlike training", "mean percentile"],
        drift=_segment_tables(report, _drift_row),
    )


def headline(report: LabelReport) -> str:
    """A sentence that compares the router's expected cost and accuracy with those of the most accurate target."""
    sums, best = report.tally.everything, report.most_accurate
    right, best_right = (shown(share, "%") for share in (sums.share("chosen_correct"), _mean(sums, "correct", best)))
    return (
        f"{sums.total('lines'):,.0f} lines: routing is expected to cost {usd(sums.total('chosen_cost_usd'))} with "
        f"{right} of the answers right; sending all to {report.pool.target_names[best]}, the most accurate target, "
        f"would cost {usd(float(sums['cost_usd'][best]))} with {best_right} right."
    )


def advice(report: LabelReport) -> str | None:
    """Names the cheapest tolerance that is expected to be as accurate as the most accurate target alone, if any is."""
    sums, best = report.tally.everything, report.most_accurate
    as_accurate = np.flatnonzero(sums["tolerance_correct"] >= sums["correct"][best])
    if not as_accurate.size:
        return None
    k, name = int(as_accurate[np.argmin(sums["tolerance_cost_usd"][as_accurate])]), report.pool.target_names[best]
    cost, alone = float(sums["tolerance_cost_usd"][k]), float(sums["cost_usd"][best])
    if cost >= alone:
        none = f"No tolerance is expected to be as accurate as {name} alone for less."
        chosen, fewer = sums.total("chosen_cost_usd"), _mean(sums, "correct", best) - sums.share("chosen_correct")
        if chosen >= alone:
            return none
        saving = shown(1.0 - chosen / alone, "%")
        return f"{none} The decisions here cost {saving} less, with {100.0 * fewer:.1f} points fewer right answers."
    return (
        f"Tolerance {exactly(TOLERANCES[k])} is the cheapest that is expected to be as accurate as {name} alone: it "
        f"costs {usd(cost)}, {shown(1.0 - cost / alone, '%')} less. These are estimates of the router, without an "
        "interval: evaluate it on graded answers before you rely on them."
    )


def _mean(sums: Sums, name: str, index: int) -> float:
    return float(sums[name][index]) / sums.total("lines")


def _budget(report: LabelReport) -> str | None:
    allocation = report.allocation
    if allocation is None:
        return None
    price = usd(1.0 / allocation.high_price) if allocation.high_price else "nothing"
    return (
        f"{usd(allocation.cost_usd)} of the budget of {usd(allocation.budget_usd)} is spent. One more correct answer "
        f"would cost {price}. No other choice within the budget has over {shown(allocation.gap, '.4%')} more correct "
        "answers."
    )


def _used(report: LabelReport) -> str | None:
    sums = report.tally.everything
    if not sums.total("used"):
        return None
    right, instead = (shown(sums.share(name, "used"), "%") for name in ("used_correct", "instead_correct"))
    return (
        f"The log records the target and the cost or answer length of {sums.total('used'):,.0f} lines: they cost "
        f"{usd(sums.total('used_cost_usd'))} ({usd(sums.total('used_expected_cost_usd'))} expected), with {right} of "
        "the answers expected to be right. Routing the same lines is expected to cost "
        f"{usd(sums.total('instead_cost_usd'))} with {instead} right."
    )


def _costs(report: LabelReport) -> LogCosts:
    """The router's choice, points of its curve that differ in cost, and the targets, the most accurate first."""
    sums, names = report.tally.everything, report.pool.target_names
    curve = [
        (float(cost), _mean(sums, "tolerance_correct", k)) for k, cost in enumerate(sums["tolerance_cost_usd"].tolist())
    ]
    picked = spread_by_cost([cost for cost, _ in curve], _NUM_TOLERANCES).tolist()
    order = np.argsort(-sums["correct"], kind="stable").tolist()
    return LogCosts(
        chosen=(sums.total("chosen_cost_usd"), sums.share("chosen_correct")),
        curve=curve,
        tolerances={TOLERANCES[k]: curve[k] for k in picked},
        singles={names[t]: (float(sums["cost_usd"][t]), _mean(sums, "correct", t)) for t in order},
        rule="budget" if report.allocation is not None else f"tolerance {exactly(report.tolerance)}",
    )


def _cost_rows(costs: LogCosts) -> list[list[str]]:
    named = {f"tolerance {exactly(tolerance)}": point for tolerance, point in costs.tolerances.items()}
    named.pop(costs.rule, None)
    points = [
        (f"router, {costs.rule}: this choice", costs.chosen),
        *((f"router, {name}", point) for name, point in named.items()),
        *((f"always {name}", point) for name, point in costs.singles.items()),
    ]
    return [[title, usd(cost), shown(right, "%")] for title, (cost, right) in points]


def _segment_tables(report: LabelReport, row: Any) -> dict[str, list[list[str]]]:
    tally = report.tally
    tables = {"all lines": [["all lines", *row(tally.segments[EVERYTHING])]]}
    for column in tally.columns:
        values = tally.values_of(column)
        largest = sorted(values, key=lambda value: -tally.segments[column, value].total("lines"))[:_MAX_ROWS]
        tables[column] = [[value, *row(tally.segments[column, value])] for value in sorted(largest)]
    return tables


def _share_row(sums: Sums) -> list[str]:
    shares = [shown(count / sums.total("lines"), "%") for count in sums["chosen"].tolist()]
    return [f"{sums.total('lines'):,.0f}", usd(sums.total("chosen_cost_usd")), *shares]


def _drift_row(sums: Sums) -> list[str]:
    shares = (shown(sums.share(name, "placed"), "%") for name in ("strangers", "percentile"))
    return [f"{sums.total('lines'):,.0f}", *shares]
