"""What policies would have been worth on the requests of a log, and which of these figures can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefill_router import storage
from prefill_router.evaluation.contenders import finite
from prefill_router.evaluation.off_policy import PolicyValue
from prefill_router.reports.evaluation_page import TEMPLATES, Table, in_words, shown, with_interval

ENOUGH_REQUESTS = 100  # worth as many, half the width of a 95 % interval is at most some 10 points
ENOUGH_SUPPORT = 0.99


@dataclass(frozen=True)
class LogReport:
    router_version: str
    pool: str
    num_requests: int
    explored: float  # share of requests whose target was drawn, or could have been another
    mean_reward: float  # of the log as it is
    policies: Sequence[PolicyValue]  # the router first
    num_draws: int
    about: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        told = {
            "router": self.router_version,
            "requests": self.num_requests,
            "explored": self.explored,
            "mean_reward_of_the_log": self.mean_reward,
            "policies": [asdict(value) for value in self.policies],
        }
        return finite(told)  # type: ignore[no-any-return]


def write_report(uri: str, report: LogReport) -> None:
    """Writes log.json and log.html below `uri`."""
    storage.write_json(storage.join(uri, "log.json"), report.to_json())
    storage.write_bytes(storage.join(uri, "log.html"), render_html(report).encode())


def render_html(report: LogReport) -> str:
    """The report as one page that fetches nothing."""
    return TEMPLATES.get_template("log.html").render(
        r=report,
        headline=headline(report),
        trust=trust(report),
        explored=shown(report.explored, "%"),
        policies=_rows(report.policies),
        enough=(ENOUGH_REQUESTS, shown(ENOUGH_SUPPORT, ".0%")),
    )


def headline(report: LogReport) -> str:
    """One sentence: what the router would have been worth, against the log and the best single target."""
    router, *singles = report.policies
    best = max([value for value in singles if _is_told(value)] or singles, key=lambda v: v.doubly_robust.value)
    return (
        f"The router would have been worth {in_words(router.doubly_robust, '%')}, {best.policy} "
        f"{in_words(best.doubly_robust, '%')}; the log as it is, {shown(report.mean_reward, '%')}."
    )


def trust(report: LogReport) -> str:
    """One sentence: of which policies the log tells enough."""
    told = [value.policy for value in report.policies if _is_told(value)]
    others = [value.policy for value in report.policies if not _is_told(value)]
    more = "explore more (serve --explore), or wait for more feedback"
    if not told:
        return f"Trust none of these figures yet, the log tells too little of every policy: {more}."
    if not others:
        return "Trust each figure as far as its interval goes: the log tells enough of every policy."
    return (
        f"Trust the figures of {_listed(told)} as far as their intervals go; of {_listed(others)} the log tells too "
        f"little: {more}."
    )


def _is_told(value: PolicyValue) -> bool:
    return value.effective_requests >= ENOUGH_REQUESTS and value.support >= ENOUGH_SUPPORT


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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
