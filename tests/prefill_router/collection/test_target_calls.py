from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from prefill_router import storage
from prefill_router.collection.answers import ShardPlace, load_states, write_states
from prefill_router.collection.journal import Journal
from prefill_router.collection.rate_limits import Pace
from prefill_router.collection.target_calls import Asked, Spent, TargetAnswer, TargetCall, parse_answer
from prefill_router.collection.target_client import Miss, backoff_s
from prefill_router.policy.pool import Target, Upstream

TARGET = Target(
    name="small", input_price=1.0, output_price=4.0, upstream=Upstream(base_url="http://localhost", model="small-1")
)
CALL = TargetCall("p1", "name a river", TARGET, Asked(max_output_tokens=100))
ANSWER = TargetAnswer("the Rhine", "stop", 5, 3, 0, 0.25)


def test_a_call_is_named_by_what_it_asks_and_not_by_an_id() -> None:
    assert TargetCall("p2", "name a river", TARGET, CALL.asked).key == CALL.key
    others = [
        TargetCall("p1", "name a lake", TARGET, CALL.asked),
        TargetCall("p1", "name a river", TARGET, Asked(max_output_tokens=101)),
        TargetCall("p1", "name a river", TARGET.model_copy(update={"name": "big"}), CALL.asked),
    ]
    assert len({CALL.key, *(other.key for other in others)}) == 4


def test_a_call_asks_as_its_target_does_in_the_gateway() -> None:
    settings = {"system_prefix": "Be brief.", "extra_body": {"reasoning_effort": "low"}, "drop": ("temperature",)}
    assert TARGET.upstream is not None
    target = TARGET.model_copy(update={"upstream": TARGET.upstream.model_copy(update=settings)})
    call = TargetCall("p1", "name a river", target, Asked(max_output_tokens=100, temperature=0.0))
    assert json.loads(call.body()) == {
        "model": "small-1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "name a river"}],
        "max_tokens": 100,
        "reasoning_effort": "low",
    }
    added = len("Be brief.") + len('{"reasoning_effort": "low"}')
    assert call.max_input_tokens == CALL.max_input_tokens + added


@pytest.mark.parametrize("text", ["a", "naïve 漢字 🎉" * 50, "\x00\n\t "])
def test_no_tokenizer_makes_more_of_a_prompt_than_its_worst(text: str) -> None:
    call = TargetCall("p", text, TARGET, CALL.asked)
    assert call.max_input_tokens > len(text.encode())
    assert call.worst == Spent((call.max_input_tokens * 1.0 + 100 * 4.0) / 1e6, call.max_input_tokens + 100)


def test_an_answer_without_usage_is_taken_to_have_cost_the_worst() -> None:
    assert ANSWER.spent(CALL) == Spent((5 * 1.0 + 3 * 4.0) / 1e6, 8)
    assert TargetAnswer("x", "stop", None, None, 0, 0.1).spent(CALL) == CALL.worst


@pytest.mark.parametrize(
    "body",
    [{}, {"choices": []}, {"choices": [7]}, {"choices": [{"message": None}]}, {"choices": "x"}],
)
def test_what_holds_no_answer_is_none(body: dict[str, object]) -> None:
    assert parse_answer(body, 0.1) is None


def test_an_answer_is_read_whatever_else_is_missing() -> None:
    found = parse_answer({"choices": [{"message": {"content": None}}], "usage": {"prompt_tokens": "x"}}, 0.1)
    assert found == TargetAnswer("", None, None, None, 0, 0.1)


def test_an_answer_costs_what_its_usage_bills() -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 4},
    }
    said = {"choices": [{"message": {"content": "the Rhine"}}], "usage": usage}
    answer = parse_answer(said, 0.1)
    assert answer == TargetAnswer("the Rhine", None, 10, 5, 3, 0.1, 4)
    prices = {"cached_input_price": 0.1, "cache_write_price": 1.25}
    priced = TargetCall("p1", "name a river", TARGET.model_copy(update=prices), CALL.asked)
    assert answer.spent(priced).usd == pytest.approx((3 * 1.0 + 3 * 0.1 + 4 * 1.25 + 5 * 4.0) / 1e6, rel=1e-12)
    nothing = parse_answer({**said, "usage": {"prompt_tokens": 10, "completion_tokens": 0}}, 0.1)
    assert nothing is not None
    assert not nothing.is_counted  # a text has tokens


def test_answers_of_an_older_release_are_read(tmp_path: Path) -> None:
    at = place(tmp_path)
    asyncio.run(noted(at, ANSWER))
    write_states(at, load_states(at))
    table = storage.read_table(at.object)
    kept = table.drop_columns(["cache_write_tokens", "cache_write_long_tokens"])
    storage.write_bytes(at.object, storage.encode_parquet(kept))
    (state,) = load_states(at).values()
    assert state.answer == ANSWER


def test_no_minute_begins_more_than_it_may() -> None:
    pace, rng = Pace(per_minute=30), random.Random(0)
    now, begun = 0.0, []
    for _ in range(200):
        now += rng.expovariate(2.0)
        begun.append(now + pace.delay_s(1, now))
    for start in begun:
        assert sum(start <= moment < start + 60.0 - 1e-6 for moment in begun) <= 30
    assert begun[-1] < 200 * 2.0 + 5  # and the permitted rate is used up


def test_backoff_is_what_the_upstream_asks_or_grows_at_random() -> None:
    rng = random.Random(0)
    assert 3.0 <= backoff_s(1, Miss("x", retry_after_s=3.0), rng) <= 3.3
    for attempt, at_once in [(1, None), (3, 0.0), (6, None)]:
        waits = [backoff_s(attempt, Miss("x", retry_after_s=at_once), rng) for _ in range(200)]
        assert 0.0 <= min(waits) < max(waits) <= 0.5 * 2**attempt
        assert max(waits) > 0.4 * 2**attempt


def place(tmp_path: Path) -> ShardPlace:
    return ShardPlace(str(tmp_path), "0" * 32)


async def noted(at: ShardPlace, *ends: TargetAnswer | Miss | None) -> None:
    """Writes notes of attempts at the call; None is an attempt without an end."""
    journal = Journal(at.journal)
    for end in ends:
        name = await journal.begin(CALL)
        if isinstance(end, TargetAnswer):
            await journal.end(name, end, end.spent(CALL), Spent(), None)
        elif end is not None:
            await journal.end(name, None, Spent(), CALL.worst if end.may_be_paid else Spent(), end.reason)


def test_an_attempt_without_an_end_may_have_been_paid_for(tmp_path: Path) -> None:
    asyncio.run(noted(place(tmp_path), Miss("status 500"), Miss("cut", may_be_paid=True), None))
    (state,) = load_states(place(tmp_path)).values()
    assert state.answer is None
    assert state.attempts == 3
    assert state.lost == CALL.worst + CALL.worst


def test_the_reason_of_a_call_is_that_of_its_latest_attempt(tmp_path: Path) -> None:
    asyncio.run(noted(place(tmp_path), *(Miss(f"status {500 + i}") for i in range(8))))
    (state,) = load_states(place(tmp_path)).values()
    assert state.reason == "status 507"


def test_notes_become_part_of_their_shard_once(tmp_path: Path) -> None:
    at = place(tmp_path)
    asyncio.run(noted(at, None, ANSWER))
    before = load_states(at)
    write_states(at, before)
    assert not Path(at.journal).exists()
    assert load_states(at) == before
    # If the process dies between the two steps, notes that are in both places count once.
    again = place(tmp_path / "again")
    asyncio.run(noted(again, None, ANSWER))
    notes = {file.name: file.read_bytes() for file in Path(again.journal).iterdir()}
    write_states(again, load_states(again))
    Path(again.journal).mkdir()
    for name, data in notes.items():
        (Path(again.journal) / name).write_bytes(data)
    (state,) = load_states(again).values()
    assert (state.answer, state.attempts, state.lost) == (ANSWER, 2, CALL.worst)


def test_an_answer_stays_whatever_comes_after(tmp_path: Path) -> None:
    at = place(tmp_path)
    asyncio.run(noted(at, ANSWER))
    write_states(at, load_states(at))
    asyncio.run(noted(at, None))
    (state,) = load_states(at).values()
    assert (state.answer, state.spent, state.lost) == (ANSWER, ANSWER.spent(CALL), CALL.worst)
