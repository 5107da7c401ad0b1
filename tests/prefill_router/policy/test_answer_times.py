"""Times of targets: what is learnt from answers, by prompt length, and when it is unknown."""

from __future__ import annotations

import pytest

from prefill_router.policy.answer_times import AnswerTimes, ExpectedTimes, MeasuredTimes, TargetTimes
from prefill_router.policy.pool import Target

UNKNOWN = ExpectedTimes(None, None)
PLAIN = Target(name="t")
STATED = Target(name="t", ttft_s=2.0, tokens_per_s=10.0)
STREAMED = MeasuredTimes(1.0, 3.0)  # of 100 tokens: 50 a second after the first
WHOLE = MeasuredTimes(None, 4.0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def learnt(*answers: tuple[float, MeasuredTimes], num: int = 5) -> TargetTimes:
    times = TargetTimes(Clock())
    for _ in range(num):
        for input_tokens, measured in answers:
            times.add(input_tokens, 100, measured)
    return times


def test_a_target_is_unknown_until_it_has_answered_five_calls() -> None:
    assert learnt((10, STREAMED), num=4).expected(PLAIN, 10, 200) == UNKNOWN
    assert learnt((10, STREAMED)).expected(PLAIN, 10, 200) == pytest.approx((1.0, 5.0))


def test_a_pool_may_state_times_for_a_target_that_is_unknown() -> None:
    assert TargetTimes().expected(STATED, 10, 30) == (2.0, 5.0)
    assert learnt((10, STREAMED)).expected(STATED, 10, 200) == pytest.approx((1.0, 5.0))
    assert TargetTimes().expected(Target(name="t", ttft_s=2.0), 10, 30) == (2.0, None)


def test_the_first_token_depends_on_the_prompts_length() -> None:
    times = learnt((100, STREAMED), (10_000, MeasuredTimes(9.0, 11.0)))
    assert [times.first_s(tokens) for tokens in (1, 256, 10_000, 16_384)] == pytest.approx([1.0, 1.0, 9.0, 9.0])
    assert [times.first_s(tokens) for tokens in (1024, 1_000_000)] == pytest.approx([1.0, 9.0])  # the nearest


def test_answers_in_one_piece_tell_the_whole_time_alone() -> None:
    times = learnt((10, WHOLE))
    assert times.expected(PLAIN, 10, 200) == pytest.approx((None, 8.0))
    assert times.expected(STATED, 10, 200) == pytest.approx((2.0, 8.0))
    assert times.tokens_per_s == pytest.approx(25.0)
    assert learnt((10, WHOLE), (10, STREAMED)).expected(PLAIN, 10, 200) == pytest.approx((1.0, 5.0))


def test_recent_answers_count_more() -> None:
    times = learnt((10, STREAMED), num=100)
    for _ in range(20):
        times.add(10, 100, MeasuredTimes(2.0, 4.0))
    weight = 0.95**20  # of the earlier ones, of a total of 1 / 0.05 each
    assert times.first_s(10) == pytest.approx(weight * 1.0 + (1 - weight) * 2.0, rel=1e-2)


def test_a_target_that_was_not_asked_for_ten_minutes_is_unknown_again() -> None:
    clock = Clock()
    times = TargetTimes(clock)
    for _ in range(5):
        times.add(10, 100, STREAMED)
    clock.now_s = 600.0
    assert times.expected(PLAIN, 10, 200) == pytest.approx((1.0, 5.0))
    clock.now_s = 600.1
    assert times.expected(PLAIN, 10, 200) == UNKNOWN
    times.add(10, 100, MeasuredTimes(7.0, 8.0))
    assert times.expected(PLAIN, 10, 200) == UNKNOWN  # what is forgotten counts no more


def test_few_streams_of_each_length_tell_nothing_of_the_whole_time() -> None:
    times = learnt((10, STREAMED), (1000, STREAMED), num=3)
    assert times.expected(PLAIN, 10, 200) == UNKNOWN


def test_targets_are_kept_apart() -> None:
    times = AnswerTimes()
    for _ in range(5):
        times.of("a").add(10, 100, STREAMED)
    assert times.of("a").first_s(10) == pytest.approx(1.0)
    assert times.of("b").first_s(10) is None
