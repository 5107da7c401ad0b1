"""The circuit breaker, with a clock that tests set."""

from __future__ import annotations

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


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.begin()
        breaker.fail()


def pause_s(breaker: Breaker, clock: Clock) -> float:
    """How long the breaker stays open from now on."""
    start_s = clock.now_s
    while breaker.is_open:
        clock.now_s += 0.5
    return clock.now_s - start_s


def test_four_failures_in_a_row_leave_it_closed_and_the_fifth_opens_it(breaker: Breaker) -> None:
    fail(breaker, 4)
    assert not breaker.is_open
    fail(breaker)
    assert breaker.is_open


def test_a_success_in_between_begins_the_row_anew(breaker: Breaker) -> None:
    fail(breaker, 4)
    breaker.succeed()
    fail(breaker, 4)
    assert not breaker.is_open


def test_each_trial_that_fails_doubles_the_pause_up_to_a_minute(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 5)
    pauses = []
    for _ in range(7):
        pauses.append(pause_s(breaker, clock))
        fail(breaker)
    assert pauses == [2, 4, 8, 16, 32, 60, 60]


def test_after_a_pause_one_call_tries_while_others_wait(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 5)
    pause_s(breaker, clock)
    breaker.begin()
    assert breaker.is_open


def test_a_trial_that_is_never_heard_of_makes_room_for_another(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 5)
    pause_s(breaker, clock)
    breaker.begin()
    assert pause_s(breaker, clock) == 4
    assert not breaker.is_open


def test_a_trial_that_succeeds_closes_it_and_forgets_the_past(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 5)
    pause_s(breaker, clock)
    fail(breaker)
    breaker.begin()
    breaker.succeed()
    assert not breaker.is_open
    fail(breaker, 5)
    assert pause_s(breaker, clock) == 2


def test_retry_after_opens_it_at_the_first_failure(breaker: Breaker, clock: Clock) -> None:
    breaker.fail(retry_after_s=7)
    assert pause_s(breaker, clock) == 7


def test_retry_after_is_believed_for_a_minute_at_most(breaker: Breaker, clock: Clock) -> None:
    breaker.fail(retry_after_s=86_400)
    assert pause_s(breaker, clock) == 60


def test_another_failure_does_not_shorten_what_retry_after_said(breaker: Breaker, clock: Clock) -> None:
    breaker.fail(retry_after_s=30)
    fail(breaker, 4)
    assert pause_s(breaker, clock) == 30


def test_a_call_that_goes_out_in_spite_of_it_does_not_shorten_what_retry_after_said(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 4)
    breaker.fail(retry_after_s=30)
    breaker.begin()
    assert pause_s(breaker, clock) == 30


def test_calls_under_way_that_fail_together_make_one_pause(breaker: Breaker, clock: Clock) -> None:
    for _ in range(20):
        breaker.begin()
    for _ in range(20):
        breaker.fail()
    assert pause_s(breaker, clock) == 2
    fail(breaker)
    assert pause_s(breaker, clock) == 4
