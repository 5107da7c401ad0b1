"""Looking up calls by a caller's request id."""

from __future__ import annotations

from datetime import UTC, datetime

from prefill_serve.gateway.call_record import CallRecord
from prefill_serve.gateway.state.call_memory import CallMemory


def call(request_id: str, caller: str = "ann") -> CallRecord:
    return CallRecord(request_id, caller, datetime.now(UTC), "answered")


def remembered(*calls: CallRecord, most: int = 10) -> CallMemory[str]:
    memory = CallMemory[str](most)
    for each in calls:
        memory.add(each)
    return memory


def test_an_id_counts_for_its_caller_only() -> None:
    of_ann, of_bob = call("same"), call("same", "bob")
    memory = remembered(of_ann, of_bob)
    assert memory.call(("ann", "same")) is of_ann
    assert memory.call(("bob", "same")) is of_bob
    assert memory.call(("eve", "same")) is None


def test_an_id_finds_the_latest_call_and_the_others_are_remembered_too() -> None:
    first, second = call("same"), call("same")
    memory = remembered(first, second)
    assert memory.call(("ann", "same")) is second
    assert first.call_id in memory
    assert second.call_id in memory


def test_of_too_many_calls_the_oldest_is_forgotten_and_a_later_one_keeps_its_id() -> None:
    calls = [call("same"), call("other"), call("same")]
    memory = remembered(*calls, most=2)
    assert [each.call_id in memory for each in calls] == [False, True, True]
    assert memory.call(("ann", "same")) is calls[2]
    memory.add(call("new"))
    assert memory.call(("ann", "other")) is None


def test_what_was_given_is_found_by_its_caller_after_the_call_is_forgotten() -> None:
    first, other, later = call("same"), call("other"), call("same")
    memory = remembered(first, most=1)
    memory.add_feedback(first.alias, first.call_id, "good")
    memory.add(other)
    assert (memory.call(first.alias), memory.feedback(first.alias)) == (None, "good")
    assert memory.feedback(("bob", "same")) is None
    memory.add(later)
    assert (memory.call(first.alias), memory.feedback(first.alias)) == (later, None)
    assert set(memory.aliases) == {first.alias}
