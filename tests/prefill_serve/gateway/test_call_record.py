"""Call records as lines of the journal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from prefill_serve.gateway.call_record import CallRecord, Usage

AT = datetime(2026, 3, 1, 12, 30, 5, 123456, UTC)
LEAST = CallRecord("r-1", "", AT, "failed")
MOST = CallRecord(
    request_id="r-2",
    caller="Zoë",
    at=AT,
    end="answered",
    target="big\nmodel",
    failed=["small", "small-2"],
    is_pinned=True,
    prompt_id="p",
    prompt=[{"role": "user", "content": "\u2028 ß \ud800"}],
    p_correct={"big\nmodel": 0.1 + 0.2},
    expected_cost_usd={"big\nmodel": 1e-7},
    propensity=1 / 3,
    router_version="v",
    usage=Usage(10, 5, 3),
    cost_usd=1 / 7,
    cost_kind="estimated",
    lost_usd={"small": 1 / 11},
)


@pytest.mark.parametrize("served", [LEAST, MOST])
def test_a_record_comes_back_as_it_went(served: CallRecord) -> None:
    assert CallRecord.from_json(served.to_json()) == served
    assert CallRecord.from_json(served.to_json().encode()) == served


def test_a_cost_of_a_record_from_before_there_were_kinds_was_reported() -> None:
    fields = json.loads(MOST.to_json())
    del fields["cost_kind"], fields["lost_usd"]
    served = CallRecord.from_json(json.dumps(fields))
    assert served.reported_usd == served.charged_usd == 1 / 7


def test_usage_comes_back_by_name() -> None:
    usage = CallRecord.from_json(MOST.to_json()).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens) == (10, 5, 3)


def test_a_record_is_one_line_of_ascii() -> None:
    line = MOST.to_json()
    assert line.isascii()
    assert len(line.splitlines()) == 1


def test_a_time_of_another_zone_is_the_same_moment() -> None:
    there = AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert CallRecord.from_json(CallRecord("r", "", there, "routed").to_json()).at == AT
