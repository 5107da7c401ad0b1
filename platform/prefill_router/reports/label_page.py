"""What a labelled log costs, on single targets, on the router and on what it used; and how far to trust that."""

# T targets, K tolerances

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefill_router import storage
from prefill_router.common.money import usd
from prefill_router.common.versions import versions
from prefill_router.policy.pool import Pool
from prefill_router.query_log.aggregates import EVERYTHING, TOLERANCES, Sums, Tally
from prefill_router.query_log.allocation import Allocation
from prefill_router.reports.evaluation_page import TEMPLATES, shown

_MOST_ROWS = 60  # of a table, the largest segments; all of them are in report.json


@dataclass(frozen=True)
class LabelReport:
    router_version: str
    pool: Pool
    tolerance: float
    allocation: Allocation | None
    tally: Tally
    num_quarantined: int
    about: Mapping[str, str]

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


def write_report(uri: str, report: LabelReport) -> None:
    """Writes report.json and report.html below `uri`."""
    storage.write_json(storage.join(uri, "report.json"), report.to_json())
    storage.write_bytes(storage.join(uri, "report.html"), render_html(report).encode())


def render_html(report: LabelReport) -> str:
    """The report as one page that fetches nothing."""
    return TEMPLATES.get_template("label.html").render(
        r=report,
        headline=headline(report),
        budget=_budget(report),
        used=_used(report),
        costs=_cost_rows(report),
        shares_heads=["", "lines", "cost", *report.pool.target_names],
        shares=_segment_tables(report, _share_row),
        drift_heads=["", "lines", "unlike training", "mean percentile"],
        drift=_segment_tables(report, _drift_row),
        about={**report.about, "Versions": versions()},
    )


def headline(report: LabelReport) -> str:
    """One sentence: what the router costs and answers, against the single target that answers the most."""
    sums = report.tally.everything
    best = int(np.argmax(sums["correct"]))
    right, best_right = (shown(share, "%") for share in (sums.share("chosen_correct"), _mean(sums, "correct", best)))
    return (
        f"{sums.total('lines'):,.0f} lines: {usd(sums.total('chosen_cost_usd'))} as routed, for {right} expected to be "
        f"right; always {report.pool.target_names[best]} would cost {usd(float(sums['cost_usd'][best]))} for "
        f"{best_right}."
    )


def _mean(sums: Sums, name: str, place: int) -> float:
    return float(sums[name][place]) / sums.total("lines")


def _budget(report: LabelReport) -> str | None:
    found = report.allocation
    if found is None:
        return None
    price = usd(1.0 / found.high_price) if found.high_price else "nothing"
    return (
        f"Of a budget of {usd(found.budget_usd)}, {usd(found.cost_usd)} are spent. A correct answer more would cost "
        f"{price}; choosing otherwise could win at most {shown(found.gap, '.4%')} more correct answers."
    )


def _used(report: LabelReport) -> str | None:
    sums = report.tally.everything
    if not sums.total("used"):
        return None
    right, instead = (shown(sums.share(name, "used"), "%") for name in ("used_correct", "instead_correct"))
    return (
        f"The log tells of {sums.total('used'):,.0f} lines which target answered and how long: they cost "
        f"{usd(sums.total('used_cost_usd'))} ({usd(sums.total('used_expected_cost_usd'))} were to be expected) for "
        f"{right} expected to be right. As routed, the same lines are expected to cost "
        f"{usd(sums.total('instead_cost_usd'))} for {instead}."
    )


def _cost_rows(report: LabelReport) -> list[list[str]]:
    sums, names = report.tally.everything, report.pool.target_names
    way = "the budget" if report.allocation is not None else f"tolerance {report.tolerance:.3f}"
    points = [(f"router, {way}", sums.total("chosen_cost_usd"), sums.share("chosen_correct"))]
    points += [
        (f"router, tolerance {tolerance:g}", float(sums["tolerance_cost_usd"][k]), _mean(sums, "tolerance_correct", k))
        for k, tolerance in enumerate(TOLERANCES)
    ]
    points += [
        (f"always {names[t]}", float(sums["cost_usd"][t]), _mean(sums, "correct", t))
        for t in np.argsort(-sums["correct"], kind="stable").tolist()
    ]
    return [[title, usd(cost), shown(right, "%")] for title, cost, right in points]


def _segment_tables(report: LabelReport, row: Any) -> dict[str, list[list[str]]]:
    tally = report.tally
    tables = {"all lines": [["all lines", *row(tally.segments[EVERYTHING])]]}
    for column in tally.columns:
        values = tally.values_of(column)
        largest = sorted(values, key=lambda value: -tally.segments[column, value].total("lines"))[:_MOST_ROWS]
        tables[column] = [[value, *row(tally.segments[column, value])] for value in sorted(largest)]
    return tables


def _share_row(sums: Sums) -> list[str]:
    shares = [shown(count / sums.total("lines"), "%") for count in sums["chosen"].tolist()]
    return [f"{sums.total('lines'):,.0f}", usd(sums.total("chosen_cost_usd")), *shares]


def _drift_row(sums: Sums) -> list[str]:
    shares = (shown(sums.share(name, "placed"), "%") for name in ("strangers", "percentile"))
    return [f"{sums.total('lines'):,.0f}", *shares]
