"""Finding the conversation that a call continues."""

from __future__ import annotations

from typing import Any

import pytest

from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.conversation_keys import answer_key, has_sealed_reasoning, thread_of
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.responses_calls import ResponsesCall
from prefill_serve.gateway.state import conversations
from prefill_serve.gateway.state.conversations import Conversations, Past

SYSTEM = {"role": "system", "content": "be brief"}
FIRST = {"role": "user", "content": "what is 17 * 23?"}
ANSWER = {"role": "assistant", "content": "391"}
SECOND = {"role": "user", "content": "and halved?"}
ANSWER2 = {"role": "assistant", "content": "195.5"}
THIRD = {"role": "user", "content": "rounded?"}


def chat(*messages: dict[str, Any]) -> ChatCall:
    return ChatCall({"messages": list(messages)})


class Gateway:
    """Conversations, used as the gateway does."""

    def __init__(self) -> None:
        self.conversations = Conversations()

    def answered(self, call: Call, target: str, caller: str = "ann", session: str | None = None) -> None:
        thread = thread_of(call, caller, session)
        self.conversations.keep([thread.own], Past(target), thread.main)

    def target(self, call: Call, caller: str = "ann", session: str | None = None) -> str | None:
        thread = thread_of(call, caller, session)
        past = self.conversations.past(thread.earlier, thread.main)
        return None if past is None else past.target


@pytest.fixture
def past() -> Gateway:
    return Gateway()


def test_a_follow_up_finds_the_target_of_what_was_said_before(past: Gateway) -> None:
    past.answered(chat(SYSTEM, FIRST), "small")
    assert past.target(chat(SYSTEM, FIRST, ANSWER, SECOND)) == "small"


def test_the_latest_answer_decides(past: Gateway) -> None:
    past.answered(chat(FIRST), "small")
    past.answered(chat(FIRST, ANSWER, SECOND), "big")
    assert past.target(chat(FIRST, ANSWER, SECOND, ANSWER2, THIRD)) == "big"


def test_where_the_latest_is_not_known_an_earlier_one_does(past: Gateway) -> None:
    past.answered(chat(FIRST), "small")
    assert past.target(chat(FIRST, ANSWER, SECOND, ANSWER2, THIRD)) == "small"


def test_the_first_call_has_no_past(past: Gateway) -> None:
    past.answered(chat(FIRST), "small")
    assert past.target(chat(FIRST)) is None
    assert thread_of(chat(FIRST), "ann", None).earlier == []


def test_an_edit_of_what_was_said_is_another_conversation(past: Gateway) -> None:
    past.answered(chat(FIRST), "small")
    edited = {"role": "user", "content": "what is 17 * 24?"}
    assert past.target(chat(edited, ANSWER, SECOND)) is None


def test_branches_from_one_question_have_their_own_targets(past: Gateway) -> None:
    other = {"role": "user", "content": "and doubled?"}
    past.answered(chat(FIRST, ANSWER, SECOND), "big")
    past.answered(chat(FIRST, ANSWER, other), "small")
    assert past.target(chat(FIRST, ANSWER, SECOND, ANSWER2, THIRD)) == "big"
    assert past.target(chat(FIRST, ANSWER, other, ANSWER2, THIRD)) == "small"


def test_an_answer_that_the_caller_changed_is_still_found_by_what_came_before(past: Gateway) -> None:
    past.answered(chat(FIRST), "small")
    assert past.target(chat(FIRST, {"role": "assistant", "content": "it is 391"}, SECOND)) == "small"


def test_the_results_of_tools_belong_to_the_conversation(past: Gateway) -> None:
    asks = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    tool = {"role": "tool", "tool_call_id": "c", "content": "sunny"}
    past.answered(chat(FIRST), "small")
    assert past.target(chat(FIRST, asks, tool)) == "small"
    past.answered(chat(FIRST, asks, tool), "big")
    assert past.target(chat(FIRST, asks, tool, ANSWER, SECOND)) == "big"


def test_fields_that_say_nothing_make_no_difference(past: Gateway) -> None:
    asks = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}
    same = {"tool_calls": [{"type": "function", "id": "c"}], "refusal": None, "role": "assistant"}
    past.answered(chat(FIRST, asks, SECOND), "big")
    assert past.target(chat({**FIRST, "name": "ann"}, same, SECOND, ANSWER, THIRD)) == "big"


def test_nobody_finds_what_another_caller_began(past: Gateway) -> None:
    past.answered(chat(FIRST), "small", "ann")
    past.answered(chat(FIRST), "big", "bob", "s-1")
    assert past.target(chat(FIRST, ANSWER, SECOND), "bob") is None
    assert past.target(chat(SECOND), "ann", "s-1") is None


def test_a_session_keeps_its_target_whatever_is_said(past: Gateway) -> None:
    past.answered(chat(FIRST), "small", session="s-1")
    assert past.target(chat(SECOND), session="s-1") == "small"
    assert past.target(chat(SECOND), session="s-2") is None
    assert past.target(chat(FIRST, ANSWER, SECOND)) is None


def test_an_empty_session_is_none(past: Gateway) -> None:
    past.answered(chat(FIRST), "small", session="")
    assert past.target(chat(SECOND), session="") is None
    assert past.target(chat(FIRST, ANSWER, SECOND), session="") == "small"


def test_a_response_goes_on_at_the_target_that_keeps_the_one_before(past: Gateway) -> None:
    past.conversations.keep([answer_key("ann", "resp_1")], Past("big"))
    call = ResponsesCall({"input": "and halved?", "previous_response_id": "resp_1"})
    assert past.target(call) == "big"
    assert past.target(call, session="s-1") == "big"
    assert past.target(call, caller="bob") is None


def test_a_responses_history_is_found_as_a_chats_is(past: Gateway) -> None:
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "391"}]}
    past.answered(ResponsesCall({"input": "what is 17 * 23?"}), "small")
    assert past.target(ResponsesCall({"input": [FIRST, answer, SECOND]})) == "small"


def test_half_characters_are_no_obstacle(past: Gateway) -> None:
    odd = {"role": "user", "content": "half \ud83d"}
    past.answered(chat(odd), "small")
    assert past.target(chat(odd, ANSWER, SECOND)) == "small"


def test_caller_and_session_are_not_run_together() -> None:
    assert thread_of(chat(FIRST), "a", "bc").own != thread_of(chat(FIRST), "ab", "c").own


def test_the_conversation_that_was_quiet_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "_REMEMBERED", 2)
    kept = Conversations()
    for key in (b"a", b"b", b"a", b"c"):
        kept.keep([key], Past("small"))
    assert [kept.target([key]) for key in (b"a", b"b", b"c")] == ["small", None, "small"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"content": None}, False),
        ({"content": 'my "signature": "x"'}, False),
        ({"reasoning_content": "seventeen times"}, False),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "hm", "signature": None}]}, False),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "hm", "signature": "EqQB"}]}, True),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}, True),
        ({"content": [{"type": "thinking", "thinking": "hm", "signature": "EqQB"}]}, True),
        ({"content": [{"type": "redacted_thinking", "data": "EmwK"}]}, True),
        ({"tool_calls": [{"function": {"name": "f", "arguments": '{"signature": "x"}'}}]}, False),
        ({"tool_calls": [{"extra_content": {"google": {"thought_signature": "Cs4B"}}}]}, True),
    ],
)
def test_reasoning_is_sealed_if_it_is_encrypted_or_signed(fields: dict[str, Any], expected: bool) -> None:
    assert has_sealed_reasoning([FIRST, {**ANSWER, **fields}, SECOND]) is expected
    assert not has_sealed_reasoning([{**FIRST, **fields}])


def test_reasoning_of_a_response_is_sealed_if_it_is_encrypted() -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}
    assert has_sealed_reasoning(ResponsesCall({"input": [FIRST, item, ANSWER]}).messages)
    assert not has_sealed_reasoning(ResponsesCall({"input": [FIRST, {**item, "encrypted_content": None}]}).messages)


def test_deep_content_is_not_searched_without_end() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert not has_sealed_reasoning([{**ANSWER, "content": deep}])
