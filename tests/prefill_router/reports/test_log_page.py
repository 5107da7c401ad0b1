"""The feedback report: its sentences and its figures."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from prefill_router.evaluation.off_policy import PolicyValue
from prefill_router.metrics import Interval
from prefill_router.reports.log_page import LogReport, headline, render_html, trust


def worth(policy: str, value: float = 0.7, requests: float = 500.0, support: float = 1.0) -> PolicyValue:
    figures = [Interval(value + shift, value + shift - 0.05, value + shift + 0.06) for shift in (0.01, 0.02, 0.0)]
    return PolicyValue(policy, *figures, model=0.66, support=support, effective_requests=requests)


def report(*policies: PolicyValue) -> LogReport:
    return LogReport("v1", "a <pool>", 1_234, 0.25, 0.61, policies, 500, {"Feedback": "s3://bucket/feedback"})


WELL_KNOWN = worth("router"), worth("always big", 0.72), worth("always small", 0.4)


def test_the_headline_compares_the_router_with_the_log_and_the_best_single_target() -> None:
    assert headline(report(*WELL_KNOWN)) == (
        "Estimated value of the router: 70.0% (65.0% to 76.0%); of always big: 72.0% (67.0% to 78.0%); of the logged "
        "requests: 61.0%."
    )


def test_a_single_target_without_a_reliable_estimate_is_not_the_best() -> None:
    lucky = worth("always lucky", 0.99, requests=3.0)
    assert "always big" in headline(report(*WELL_KNOWN, lucky))
    assert "always lucky" in headline(report(worth("router"), lucky))  # there is no other


@pytest.mark.parametrize("little", [{"requests": 99.0}, {"support": 0.98}, {"requests": nan}])
def test_estimates_with_enough_requests_and_support_are_reliable(little: dict[str, float]) -> None:
    all_of_them = trust(report(*WELL_KNOWN))
    some = trust(report(*WELL_KNOWN[:2], worth("always small", **little)))
    none = trust(report(*(worth(value.policy, **little) for value in WELL_KNOWN)))
    assert all_of_them.startswith("All estimates are reliable within their intervals")
    assert some.startswith("The estimates for router and always big are reliable")
    assert "For always small the log has too few requests" in some
    assert none.startswith("No estimate is reliable yet")


def test_the_page_shows_every_figure_and_escapes_names() -> None:
    page = render_html(report(*WELL_KNOWN))
    assert "<h1>Feedback report: a &lt;pool&gt;</h1>" in page
    for figure in ("70.0%", "71.0%", "72.0%", "66.0%", "65.0% to 76.0%", "1,234", "25.0%", "s3://bucket/feedback"):
        assert figure in page


def test_an_undefined_value_is_a_dash() -> None:
    unknown = replace(worth("always new"), snips=Interval(nan, nan, nan), effective_requests=nan)
    page = render_html(report(worth("router"), unknown))
    assert "nan" not in page
    assert page.count("<td>–</td>") == 2
