"""The circuit breaker, with a fake clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from prefill_serve.gateway.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, callers: Iterable[str]) -> None:
    for caller in callers:
        breaker.fail(caller)


def until_probed_s(breaker: Breaker, clock: Clock) -> float:
    """Seconds until the breaker wants a probe."""
    start_s = clock.now_s
    while not breaker.wants_probe:
        clock.now_s += 0.5
    return clock.now_s - start_s


# --- evidence of callers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("callers", ["ababa", "aabbb", "abcde", "aaabb", "bbaaa", "aaaaaaaabb"])
def test_five_failures_that_several_callers_share_open_it(breaker: Breaker, callers: str) -> None:
    fail(breaker, callers[:-1])
    assert not breaker.is_open
    fail(breaker, callers[-1])
    assert breaker.is_open


@pytest.mark.parametrize("callers", ["aaaaa", "a" * 100, "aaaab", "baaaa", "a" * 50 + "b" + "a" * 50])
def test_failures_of_one_caller_are_a_doubt_and_do_not_open_it(breaker: Breaker, callers: str) -> None:
    fail(breaker, callers[:4])
    assert not breaker.wants_probe
    fail(breaker, callers[4:])
    assert not breaker.is_open
    assert breaker.wants_probe


def test_a_success_in_between_begins_the_row_anew(breaker: Breaker) -> None:
    fail(breaker, "abab")
    breaker.succeed()
    fail(breaker, "abab")
    assert not breaker.is_open


def test_what_a_caller_can_provoke_is_a_doubt_and_no_failure(breaker: Breaker) -> None:
    for _ in range(100):
        breaker.doubt()
    assert not breaker.is_open
    assert breaker.wants_probe
    fail(breaker, "abab")
    assert not breaker.is_open


def test_one_caller_that_is_told_when_to_come_back_is_a_doubt(breaker: Breaker) -> None:
    for _ in range(100):
        breaker.fail("a", retry_after_s=60.0)
    assert not breaker.is_open
    assert breaker.wants_probe


# --- probes ------------------------------------------------------------------------------------------------------


def test_a_probe_that_fails_opens_it_whoever_raised_the_doubt(breaker: Breaker) -> None:
    fail(breaker, "aaaaa")
    breaker.begin_probe()
    assert not breaker.wants_probe
    breaker.fail_probe()
    assert breaker.is_open


def test_a_probe_that_passes_settles_the_doubt(breaker: Breaker) -> None:
    fail(breaker, "aaaaa")
    breaker.begin_probe()
    breaker.pass_probe()
    assert not breaker.is_open
    assert not breaker.wants_probe


def test_a_probe_is_made_every_ten_seconds_at_most(breaker: Breaker, clock: Clock) -> None:
    breaker.doubt()
    breaker.begin_probe()
    breaker.pass_probe()
    breaker.doubt()
    assert until_probed_s(breaker, clock) == 10


def test_failures_that_several_callers_share_open_it_though_probes_pass(breaker: Breaker) -> None:
    fail(breaker, "aaaaa")
    breaker.begin_probe()
    breaker.pass_probe()
    fail(breaker, "bb")
    assert breaker.is_open


def test_each_probe_that_fails_doubles_the_pause_up_to_a_minute(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, "ababa")
    pauses = []
    for _ in range(7):
        pauses.append(until_probed_s(breaker, clock))
        breaker.begin_probe()
        breaker.fail_probe()
    assert pauses == [2, 4, 8, 16, 32, 60, 60]


def test_after_a_pause_callers_wait_for_the_probe(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, "ababa")
    until_probed_s(breaker, clock)
    assert breaker.is_open
    breaker.begin_probe()
    assert breaker.is_open
    breaker.pass_probe()
    assert not breaker.is_open


def test_a_probe_that_is_never_heard_of_makes_room_for_another(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, "ababa")
    until_probed_s(breaker, clock)
    breaker.begin_probe()
    assert until_probed_s(breaker, clock) == 10


@pytest.mark.parametrize("closes", [Breaker.pass_probe, Breaker.succeed])
def test_a_probe_or_a_call_that_succeeds_closes_it_and_forgets_the_past(
    breaker: Breaker, clock: Clock, closes: object
) -> None:
    fail(breaker, "ababa")
    until_probed_s(breaker, clock)
    breaker.begin_probe()
    breaker.fail_probe()
    assert callable(closes)
    closes(breaker)
    assert not breaker.is_open
    fail(breaker, "abab")
    assert not breaker.is_open
    fail(breaker, "a")
    assert until_probed_s(breaker, clock) == 2


def test_one_caller_does_not_prolong_a_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, "ababa")
    for _ in range(100):
        breaker.fail("a", retry_after_s=60.0)
    assert until_probed_s(breaker, clock) == 2


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(0, 2), (7, 7), (86_400, 60)])
def test_retry_after_is_believed_for_a_minute_at_most(
    breaker: Breaker, clock: Clock, retry_after_s: float, pause_s: float
) -> None:
    breaker.begin_probe()
    breaker.fail_probe(retry_after_s)
    assert until_probed_s(breaker, clock) == pause_s


def test_calls_under_way_that_fail_together_make_one_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, "ab" * 10)
    assert until_probed_s(breaker, clock) == 2
