"""What the gateway reads from calls and answers, and what it passes through unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from prefill_router.common.errors import UserError
from prefill_router.policy.pool import Target, Upstream
from prefill_serve.gateway.call_record import Usage
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.openai_calls import Call, Needs, Note, json_object
from prefill_serve.gateway.responses_calls import ResponsesCall

TARGET = Target(name="t", input_price=1.0, output_price=1.0, upstream=Upstream(base_url="http://127.0.0.1/v1"))
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
INPUT_IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
CHAT_USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
RESPONSES_USAGE = {"input_tokens": 7, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 3}}


def chat(**fields: Any) -> ChatCall:
    return ChatCall({"model": "auto", "messages": HELLO, **fields})


def responses(given: Any = "hello", **fields: Any) -> ResponsesCall:
    return ResponsesCall({"model": "auto", "input": given, **fields})


def sent(call: Call, target: Target = TARGET) -> Any:
    return json.loads(call.for_upstream(target))


def event(body: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(body).encode() + b"\n\n"


def renamed(name: str) -> Target:
    return TARGET.model_copy(update={"upstream": Upstream(base_url="http://127.0.0.1/v1", model=name)})


# --- what goes to the upstream -----------------------------------------------------------------------------------


def test_what_is_not_the_routers_goes_through_unchanged() -> None:
    body = {
        "model": "t",
        "messages": [{"role": "user", "content": "Straße \u2028 😀 \ud83d", "name": "ann", "x": None}],
        "temperature": 0.1,
        "seed": 2**60,
        "logit_bias": {"50256": -100},
        "unheard_of": {"deep": [1, [2, {"\udc00": "half"}]], "empty": {}, "no": False},
    }
    call = ChatCall.read(json.dumps(body).encode())
    assert sent(call) == body


def test_raw_unicode_goes_through() -> None:
    call = ChatCall.read('{"messages": [{"role": "user", "content": "Straße 😀"}]}'.encode())
    assert sent(call)["messages"][0]["content"] == "Straße 😀"


@pytest.mark.parametrize("make", [chat, responses])
def test_the_routers_own_fields_are_taken_out(make: Any) -> None:
    wishes = {"tolerance": 0.1, "models": ["a"], "max_cost_usd": 1.0, "min_p_correct": 0.5}
    assert sent(make(**wishes)) == sent(make())


def test_the_upstream_is_asked_for_its_own_name_of_the_model() -> None:
    assert sent(chat())["model"] == "t"
    assert sent(chat(), renamed("vendor/t-2"))["model"] == "vendor/t-2"
    assert sent(ChatCall({"messages": HELLO}))["model"] == "t"


def test_a_stream_is_asked_for_its_usage() -> None:
    assert sent(chat(stream=True))["stream_options"] == {"include_usage": True}
    assert sent(chat(stream=True, stream_options=None))["stream_options"] == {"include_usage": True}


def test_other_stream_options_stay() -> None:
    given = {"include_usage": False, "include_obfuscation": False}
    made = sent(chat(stream=True, stream_options=given))
    assert made["stream_options"] == {"include_usage": True, "include_obfuscation": False}
    assert given["include_usage"] is False


def test_an_answer_in_one_piece_is_not_asked_for_stream_options() -> None:
    assert "stream_options" not in sent(chat())
    assert "stream_options" not in sent(responses(stream=True))


# --- bodies that are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "JSON"),
        (b"{", "not valid JSON: Expecting property name enclosed in double quotes at character 2"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"a": "\xff"}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "JSON"),
        (b"null", "object"),
        (b'["messages"]', "object"),
        (b'{"model": 7}', "model"),
        (b'{"model": null}', "model"),
        (b'{"stream": "true"}', "stream"),
        (b'{"stream": 1}', "stream"),
        *((b'{"temperature": %b}' % number, "not valid JSON") for number in (b"NaN", b"-Infinity", b"1e999")),
    ],
)
def test_a_body_that_is_no_call_is_refused(raw: bytes, problem: str) -> None:
    for kind in (ChatCall, ResponsesCall):
        with pytest.raises(UserError, match=problem):
            kind.read(raw)


@pytest.mark.parametrize("messages", [None, "hello", [], ["hello"], {"role": "user"}, [HELLO]])
def test_messages_must_be_a_list_of_objects(messages: Any) -> None:
    call = chat(messages=messages)
    for read in (lambda: call.messages, lambda: call.needs, lambda: call.question):
        with pytest.raises(UserError, match="messages"):
            read()


@pytest.mark.parametrize("given", [None, 7, [], ["hello"], {"role": "user"}])
def test_an_input_must_be_text_or_a_list_of_objects(given: Any) -> None:
    with pytest.raises(UserError, match="input"):
        _ = responses(given).messages


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ({"tolerance": 2}, "tolerance"),
        ({"max_cost_usd": -1}, "max_cost_usd"),
        ({"min_p_correct": "high"}, "min_p_correct"),
        ({"models": []}, "models"),
        ({"models": "a"}, "models"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_by_its_name(wish: dict[str, Any], problem: str) -> None:
    for read in (lambda: chat(**wish).allowed, lambda: chat(**wish).question):
        with pytest.raises(UserError, match=f"^{problem}"):
            read()


def test_a_message_that_the_router_cannot_read_is_refused_by_its_place() -> None:
    with pytest.raises(UserError, match=r"^messages\.1\.role"):
        _ = chat(messages=[*HELLO, {"role": "wizard", "content": "x"}]).question


# --- what decides the way ----------------------------------------------------------------------------------------


def test_a_model_is_pinned_by_its_name_alone() -> None:
    assert chat(model="big").pinned == "big"
    assert [chat(model=name).pinned for name in ("auto", "routed")] == [None, None]
    assert ChatCall({"messages": HELLO}).pinned is None


@pytest.mark.parametrize(("stream", "expected"), [(True, True), (False, False), (None, False)])
def test_a_stream_is_one_that_is_asked_for(stream: bool | None, expected: bool) -> None:
    assert ChatCall.read(json.dumps({"stream": stream}).encode()).is_stream is expected


def test_wishes_reach_the_router_and_null_is_none() -> None:
    question = chat(tolerance=0.1, models=["a", "b"], max_cost_usd=None, min_p_correct=0.5).question
    assert (question.tolerance, question.models, question.max_cost_usd, question.min_p_correct) == (
        0.1,
        ["a", "b"],
        None,
        0.5,
    )
    assert chat(models=["a"]).allowed == ["a"]
    assert chat().allowed is None


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, Needs(False, False, 0)),
        ({"tools": [{"type": "function"}]}, Needs(True, False, 0)),
        ({"functions": [{"name": "f"}]}, Needs(True, False, 0)),
        ({"tools": []}, Needs(False, False, 0)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "image_url"}]}]}, Needs(False, False, 0)),
        ({"messages": [*HELLO, {"role": "user", "content": [IMAGE]}]}, Needs(False, True, 0)),
        ({"max_tokens": 9}, Needs(False, False, 9)),
        ({"max_tokens": 9, "max_completion_tokens": 11}, Needs(False, False, 11)),
        ({"max_tokens": "many"}, Needs(False, False, 0)),
    ],
)
def test_needs_of_a_chat(fields: dict[str, Any], needs: Needs) -> None:
    assert chat(**fields).needs == needs


@pytest.mark.parametrize(
    ("given", "fields", "needs"),
    [
        ("hello", {}, Needs(False, False, 0)),
        ("hello", {"tools": [{"type": "web_search"}], "max_output_tokens": 9}, Needs(True, False, 9)),
        ([{"role": "user", "content": [INPUT_IMAGE]}], {}, Needs(False, True, 0)),
        (
            [{"type": "function_call_output", "call_id": "c", "output": [INPUT_IMAGE]}],
            {},
            Needs(False, True, 0),
        ),
    ],
)
def test_needs_of_a_response(given: Any, fields: dict[str, Any], needs: Needs) -> None:
    assert responses(given, **fields).needs == needs


def test_a_text_is_a_message_of_the_user() -> None:
    assert responses("hello").messages == HELLO


def test_instructions_come_first() -> None:
    assert responses("hello", instructions="be brief").messages == [{"role": "system", "content": "be brief"}, *HELLO]
    assert responses("hello", instructions=None).messages == HELLO


def test_items_become_messages_that_the_router_reads() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "what is the weather?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I'll look."}]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c", "output": {"sky": "blue"}},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "warm"}]},
        {"content": "and tomorrow?"},
    ]
    messages = responses(items).messages
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    question = responses(items).question.question_of(100)
    assert question.prompt == [
        {"role": "user", "content": "what is the weather?"},
        {"role": "assistant", "content": "I'll look."},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "tool", "content": "warm"},
        {"role": "user", "content": "and tomorrow?"},
    ]


def test_a_response_goes_on_from_the_one_that_it_names() -> None:
    assert responses(previous_response_id="resp_1").continues == "resp_1"
    assert responses(previous_response_id=None).continues is None
    assert chat(previous_response_id="resp_1").continues is None


# --- whole answers -----------------------------------------------------------------------------------------------


def test_usage_of_whole_answers() -> None:
    assert chat().usage({"usage": CHAT_USAGE}) == Usage(7, 5, 3)
    assert responses().usage({"usage": RESPONSES_USAGE}) == Usage(7, 5, 3)


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}, "none"])
def test_without_a_word_on_the_cache_nothing_was_cached(details: Any) -> None:
    assert chat().usage({"usage": {**CHAT_USAGE, "prompt_tokens_details": details}}) == Usage(7, 5, 0)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        7,
        {},
        {"prompt_tokens": 7},
        {**CHAT_USAGE, "completion_tokens": -1},
        {**CHAT_USAGE, "completion_tokens": True},
        {**CHAT_USAGE, "completion_tokens": 5.0},
        {**CHAT_USAGE, "completion_tokens": float("nan")},
        {**CHAT_USAGE, "completion_tokens": float("inf")},
        {**CHAT_USAGE, "completion_tokens": 10**30},
        {**CHAT_USAGE, "prompt_tokens": "7"},
        {**CHAT_USAGE, "prompt_tokens_details": {"cached_tokens": -1}},
        {**CHAT_USAGE, "prompt_tokens_details": {"cached_tokens": 8}},
    ],
)
def test_a_usage_that_is_none_is_not_metered(usage: Any) -> None:
    assert chat().usage({"usage": usage}) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, None),
        ({"message": "too busy"}, "too busy"),
        ({"code": 7}, "the upstream failed"),
        ("too busy", "too busy"),
    ],
)
def test_an_error_in_a_whole_answer(error: Any, said: str | None) -> None:
    assert chat().error({"error": error}) == said
    assert responses().error({"error": error}) == said


def test_only_a_response_can_be_gone_on_from() -> None:
    assert responses().answer_id({"id": "resp_1"}) == "resp_1"
    assert responses().answer_id({"id": 7}) is None
    assert chat().answer_id({"id": "chatcmpl-1"}) is None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1]", b"null", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_json_object_is_read_as_an_empty_one(data: bytes) -> None:
    assert json_object(data) == {}


# --- the text of an answer, for those that tell no usage ---------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "num_bytes"),
    [
        ({"content": "hello"}, 5),
        ({"content": ""}, 0),
        ({"content": None}, 0),
        ({"role": "assistant", "refusal": "no"}, 2),
        ({"reasoning_content": "so", "content": "hello"}, 7),
        ({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a":1}'}}]}, 9),
        ({"content": 'say "content":"no more" \\'}, 30),
    ],
)
def test_the_text_of_a_chat_is_counted(said: dict[str, Any], num_bytes: int) -> None:
    answer = {"id": "content", "choices": [{"index": 0, "delta": said, "finish_reason": None}]}
    assert chat(stream=True).text_bytes(event(answer)) == num_bytes
    assert chat().answer_bytes({"choices": [{"message": said}]}) == num_bytes


def test_the_text_of_a_response_is_counted_once() -> None:
    call = responses(stream=True)
    assert call.text_bytes(event({"type": "response.output_text.delta", "delta": "hello"})) == 5
    assert call.text_bytes(event({"type": "response.output_text.done", "text": "hello"})) == 0
    parts = [{"type": "output_text", "text": "hello"}]
    assert call.answer_bytes({"output": [{"type": "message", "content": parts}]}) == 5


# --- limits of answers -------------------------------------------------------------------------------------------


def test_a_call_whose_caller_states_no_limit_is_sent_with_the_gateways() -> None:
    way = Upstream(base_url="http://127.0.0.1/v1", limit_field="max_completion_tokens")
    other = TARGET.model_copy(update={"upstream": way})
    for call in (chat(), chat(stream=True), chat(max_tokens=None), chat(max_tokens=0), chat(max_tokens=[])):
        assert sent(call) == sent(replace(call, answer_tokens=None))
        limited = replace(call, answer_tokens=9)
        assert sent(limited) == {**sent(call), "max_tokens": 9}
        rest = {name: value for name, value in sent(call).items() if name != "max_tokens"}
        assert sent(limited, other) == {**rest, "max_completion_tokens": 9}
    assert sent(replace(responses(), answer_tokens=9)) == {**sent(responses()), "max_output_tokens": 9}


@pytest.mark.parametrize("fields", [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": "5"}])
def test_a_limit_that_the_caller_states_stays(fields: dict[str, Any]) -> None:
    assert sent(replace(chat(**fields), answer_tokens=3)) == sent(chat(**fields))


# --- events of chat completions ----------------------------------------------------------------------------------


def delta(content: str, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}}], **fields}


def test_an_ordinary_chunk_is_not_noted() -> None:
    assert chat(stream=True).note(event(delta("hello", usage=None))) is None
    assert chat(stream=True).note(b": keep-alive\n\n") is None


def test_the_chunk_of_the_usage_is_hidden_from_a_caller_who_did_not_ask() -> None:
    chunk = event({"choices": [], "usage": CHAT_USAGE})
    assert chat(stream=True).note(chunk) == Note(Usage(7, 5, 3), is_for_caller=False)
    asked = chat(stream=True, stream_options={"include_usage": True})
    assert asked.note(chunk) == Note(Usage(7, 5, 3), is_for_caller=True)


def test_the_chunk_of_a_usage_that_cannot_be_is_hidden_too() -> None:
    chunk = event({"choices": [], "usage": {**CHAT_USAGE, "prompt_tokens": -1}})
    assert chat(stream=True).note(chunk) == Note(None, is_for_caller=False)


def test_a_usage_beside_a_choice_hides_nothing() -> None:
    assert chat(stream=True).note(event(delta("hello", usage=CHAT_USAGE))) == Note(Usage(7, 5, 3))


def test_done_is_the_last() -> None:
    assert chat(stream=True).note(b"data: [DONE]\n\n") == Note(is_last=True)
    assert chat(stream=True).note(b"data:[DONE]\r\n\r\n") == Note(is_last=True)


def finish(index: Any = 0, reason: str | None = "stop") -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}


def test_a_choice_ends_with_its_finish_reason() -> None:
    assert chat(stream=True).note(event(finish())) == Note(ended=frozenset({0}))
    assert chat(stream=True).note(event(finish(reason=None))) is None
    assert chat(stream=True).note(event({"choices": [{"finish_reason": "stop"}]})) == Note(ended=frozenset({0}))


@pytest.mark.parametrize("choices", [None, {}, [None], [7], [{"index": [], "finish_reason": "stop"}]])
def test_choices_that_are_none_end_nothing(choices: Any) -> None:
    note = chat(stream=True, n=2).note(event({"choices": choices, "usage": None}))
    assert note == Note()


def test_of_many_choices_all_are_noted() -> None:
    assert chat(stream=True, n=2).note(event(delta("hello"))) == Note(begun=frozenset({0}))
    assert chat(stream=True, n=2).note(event(finish(1))) == Note(begun=frozenset({1}), ended=frozenset({1}))


@pytest.mark.parametrize(
    ("begun", "ended", "is_whole"), [([], [], False), ([], [0], True), ([0, 1], [1], False), ([0, 1], [0, 1], True)]
)
def test_a_chat_is_whole_once_each_choice_has_ended(begun: list[int], ended: list[int], is_whole: bool) -> None:
    assert chat(stream=True).is_whole(set(begun), set(ended)) is is_whole
    assert responses(stream=True).is_whole(set(begun), set(ended))  # its last event is enough


def test_an_error_event_is_noted() -> None:
    note = chat(stream=True).note(event({"error": {"message": "too busy", "code": None}}))
    assert note is not None
    assert note.error == "too busy"


@pytest.mark.parametrize("text", ['say "error"', "error", '"error": {"message": "no"}', "[DONE]", '"usage": {'])
def test_words_in_a_text_tell_nothing(text: str) -> None:
    note = chat(stream=True).note(event(delta(text)))
    assert note in (None, Note())


def test_an_error_that_is_null_is_none() -> None:
    assert chat(stream=True).note(event(delta("hello", error=None))) == Note()


def test_a_chat_that_breaks_off_ends_with_an_error() -> None:
    made = chat(stream=True).error_event('t: "cut"', "upstream_failed")
    assert made.endswith(b"\n\n")
    error = json.loads(made.removeprefix(b"data: "))["error"]
    assert (error["message"], error["code"], error["type"]) == ('t: "cut"', "upstream_failed", "server_error")


# --- events of responses -----------------------------------------------------------------------------------------


def typed(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_a_response_that_ends_tells_its_usage_and_id(status: str) -> None:
    answer = {"id": "resp_1", "usage": RESPONSES_USAGE, "error": None}
    note = responses(stream=True).note(typed(f"response.{status}", response=answer))
    assert note == Note(Usage(7, 5, 3), is_last=True, answer_id="resp_1")


def test_a_response_that_failed_says_why() -> None:
    answer = {"id": "resp_1", "usage": None, "error": {"code": "server_error", "message": "too busy"}}
    assert responses(stream=True).note(typed("response.failed", response=answer)) == Note(error="too busy")
    assert responses(stream=True).note(typed("response.failed")) == Note(error="the upstream failed")


def test_an_error_in_the_place_of_a_response() -> None:
    assert responses(stream=True).note(typed("error", message="too busy", code=None)) == Note(error="too busy")
    assert responses(stream=True).note(typed("error", error={"message": "too busy"})) == Note(error="too busy")
    assert responses(stream=True).note(event({"error": {"message": "too busy"}})) == Note(error="too busy")


@pytest.mark.parametrize("kind", ["response.created", "response.in_progress"])
def test_a_response_that_begins_tells_nothing(kind: str) -> None:
    assert responses(stream=True).note(typed(kind, response={"id": "resp_1", "error": None, "usage": None})) is None


@pytest.mark.parametrize("text", ["response.completed", '"error"', "error", "response.failed"])
def test_words_in_a_text_of_a_response_tell_nothing(text: str) -> None:
    assert responses(stream=True).note(typed("response.output_text.delta", delta=text)) is None


def test_a_response_that_breaks_off_ends_with_an_error() -> None:
    made = responses(stream=True).error_event("t: cut", "upstream_failed")
    assert made.startswith(b"event: error\ndata: ")
    body = json.loads(made.partition(b"data: ")[2])
    assert body == {"type": "error", "code": "upstream_failed", "message": "t: cut", "param": None}
