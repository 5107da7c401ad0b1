"""The benchmark of sessions itself: its trace, its upstreams' caches, and that it drives the gateway's own rule."""

from __future__ import annotations

import json

import pytest

from benchmarks import sessions
from benchmarks.sessions import SYSTEM_TOKENS, TOOL_TOKENS, Message, PrefixCache, Step
from prefill_router.policy.switching import SwitchRule

BEGINNING = TOOL_TOKENS + SYSTEM_TOKENS


def step(at_s: float, *texts: str) -> Step:
    return Step("s", "coder", [Message("user", text, 100) for text in texts], at_s, 0.0, 10, True)


def test_a_cache_holds_the_longest_prefix_that_was_used_lately() -> None:
    cache = PrefixCache(300.0)
    assert cache.read(step(0.0, "a")) == 0
    assert cache.read(step(100.0, "a", "b")) == BEGINNING + 100
    assert cache.read(step(390.0, "other")) == BEGINNING
    assert cache.read(step(400.0, "a", "b", "c")) == BEGINNING + 200
    assert cache.read(step(701.0, "a")) == 0


def test_a_trace_is_the_same_for_the_same_seed() -> None:
    assert sessions.trace(2, 0) == sessions.trace(2, 0) != sessions.trace(2, 1)


def test_sub_agents_and_summaries_occur() -> None:
    steps = sessions.trace(20, 0)
    assert {step.agent for step in steps} == {"coder", "searcher"}
    assert any("summary" in step.messages[0].text for step in steps)


def test_conversations_that_always_stay_never_move() -> None:
    assert sessions.simulated(sessions.trace(5, 0), SwitchRule(1.0), 0.05).moves == 0


def test_answers_and_caches_together_are_worth_more_where_the_cache_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sessions.main(["--sessions", "12", "--tolerance", "0.05", "--quality-usd", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    switching, aware = (
        found["policies"][f"{name}, tolerance 0.05"] for name in ("always switch", "cache-aware, 1 USD")
    )
    assert aware["cached_share"] > switching["cached_share"]
    assert aware["moves_per_session"] < switching["moves_per_session"]
    turns = found["turns"] / found["sessions"]
    worth = [turns * policy["quality"] - policy["usd_per_session"] for policy in (switching, aware)]
    assert worth[0] < worth[1]
