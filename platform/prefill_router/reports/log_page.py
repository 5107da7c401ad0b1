"""The feedback report: estimated values of policies on a gateway's log, and which estimates are reliable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefill_router import storage
from prefill_router.common.console import doing
from prefill_router.evaluation.latency_frontier import LatencyPoint
from prefill_router.evaluation.off_policy import PolicyValue
from prefill_router.evaluation.results import finite
from prefill_router.reports.evaluation_page import TEMPLATES
from prefill_router.reports.number_format import Table, as_text, in_words, shown, with_interval

ENOUGH_REQUESTS = 100  # effective requests, at which a 95 % interval is at most about ±10 points
ENOUGH_SUPPORT = 0.99


@dataclass(frozen=True)
class LogReport:
    router_version: str
    pool: str
    num_requests: int
    explored: float  # share of requests whose target was, or could have been, chosen by exploration
    mean_reward: float  # of the logged requests
    policies: Sequence[PolicyValue]  # the router first
    num_draws: int
    about: Mapping[str, str]
    frontier: Sequence[LatencyPoint] = ()  # empty if the log has no times to compare

    def to_json(self) -> dict[str, Any]:
        content = {
            "router": self.router_version,
            "requests": self.num_requests,
            "explored": self.explored,
            "mean_reward_of_the_log": self.mean_reward,
            "policies": [asdict(value) for value in self.policies],
            "latency_frontier": [asdict(point) for point in self.frontier],
        }
        return finite(content)  # type: ignore[no-any-return]


@doing("writing the report")
def write_report(uri: str, report: LogReport) -> None:
    """Writes log.json and log.html below `uri`."""
    storage.write_json(storage.join(uri, "log.json"), report.to_json())
    storage.write_bytes(storage.join(uri, "log.html"), render_html(report).encode())


def render_html(report: LogReport) -> str:
    """The report as one self-contained page."""
    return TEMPLATES.get_template("log.html").render(
        title=f"Feedback report: {report.pool}",
        about=report.about,
        r=report,
        headline=headline(report),
        trust=trust(report),
        heads=_HEADS,
        policies=_rows(report.policies),
        limit_heads=("", "doubly robust", "effective requests", "support", "cost per 1,000", "seconds"),
        limits=[_limit_row(point) for point in report.frontier],
        enough_requests=ENOUGH_REQUESTS,
        enough_support=ENOUGH_SUPPORT,
    )


def headline(report: LogReport) -> str:
    """A sentence that compares the router's value with the best single target's and the logged one."""
    router, *singles = report.policies
    best = max([value for value in singles if _is_reliable(value)] or singles, key=lambda v: v.doubly_robust.value)
    return (
        f"Estimated value of the router: {in_words(router.doubly_robust, '%')}; of {best.policy}: "
        f"{in_words(best.doubly_robust, '%')}; of the logged requests: {shown(report.mean_reward, '%')}."
    )


def trust(report: LogReport) -> str:
    """A sentence that names the policies whose estimates are reliable."""
    reliable = [value.policy for value in report.policies if _is_reliable(value)]
    others = [value.policy for value in report.policies if not _is_reliable(value)]
    remedy = "explore more (serve --explore), or wait for more feedback"
    if not reliable:
        return f"No estimate is reliable yet, because the log has too few requests for every policy: {remedy}."
    if not others:
        return "All estimates are reliable within their intervals."
    return (
        f"The estimates for {_listed(reliable)} are reliable within their intervals. For {_listed(others)} the log has "
        f"too few requests: {remedy}."
    )


def _is_reliable(value: PolicyValue) -> bool:
    return value.effective_requests >= ENOUGH_REQUESTS and value.support >= ENOUGH_SUPPORT


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_HEADS = ("", "doubly robust", "effective requests", "support", "self-normalised", "inverse propensity", "predicted")


def policy_rows(values: Sequence[PolicyValue]) -> list[tuple[str, ...]]:
    """The table of policy values as text, with aligned columns; the first row is the header."""
    rows = [_HEADS, *([as_text(cell) for cell in row] for row in _rows(values))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [tuple(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _limit_row(point: LatencyPoint) -> list[Any]:
    name, robust, requests, support, *_ = _rows([point.value])[0]
    return [name, robust, requests, support, shown(point.cost_usd, "$"), shown(point.latency_s, ".3g")]


def _rows(policies: Sequence[PolicyValue]) -> Table:
    return [
        [
            value.policy,
            with_interval(value.doubly_robust, "%"),
            shown(value.effective_requests, ",.0f"),
            shown(value.support, "%"),
            with_interval(value.snips, "%"),
            with_interval(value.ips, "%"),
            shown(value.model, "%"),
        ]
        for value in policies
    ]
