"""The fake server of OpenAI's and Anthropic's protocols, tested with OpenAI's client; its faults also on the wire."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from openai_protocol import Usage
from upstream import Fault, Upstream

KEY = "sk-test"
HELLO: Any = [{"role": "user", "content": "how do you do"}]
WEATHER: Any = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
CHAT_TOOL: Any = {"type": "function", "function": WEATHER}
ASK_WEATHER: Any = [{"role": "user", "content": "use get_weather for Oslo"}]


class River(BaseModel):
    length_km: float
    is_in: Literal["valley", "plain"]


class City(BaseModel):
    name: str
    people: int
    rivers: list[River]
    twin: City | None


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream("small", key=KEY) as server:
        yield server


@pytest.fixture
def client(upstream: Upstream) -> Iterator[OpenAI]:
    """A client that rejects answers and events that do not match OpenAI's schemas."""
    with OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0, _strict_response_validation=True) as made:
        yield made


def ask(upstream: Upstream, stream: bool = False, content: str = "one two three") -> httpx.Response:
    with asking(upstream, stream, content) as response:
        response.read()
    return response


def asking(upstream: Upstream, stream: bool, content: str = "one two three") -> AbstractContextManager[httpx.Response]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "stream": stream}
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{upstream.url}/chat/completions"
    return httpx.stream("POST", url, json=body, headers=headers, verify=False)  # skips loading all certificates


def test_chat(client: OpenAI, upstream: Upstream) -> None:
    made = client.chat.completions.create(model="tiny", messages=HELLO, seed=3, extra_body={"top_k": 5})
    assert made.choices[0].message.content == "small: how do you do"
    assert (made.object, made.model, made.choices[0].finish_reason) == ("chat.completion", "tiny", "stop")
    assert made.id.startswith("chatcmpl-")
    assert abs(made.created - time.time()) < 60
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (4, 5, 9)

    call = upstream.calls[0].wait()
    assert call.body == {"model": "tiny", "messages": HELLO, "seed": 3, "top_k": 5}
    assert call.key_matched
    assert KEY not in str(call)
    assert call.headers["content-type"] == "application/json"
    assert (call.status, call.billed, call.client_left) == (200, Usage(4, 0, 5), False)


def test_chat_streamed(client: OpenAI, upstream: Upstream) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert [c.choices[0].delta.content for c in chunks] == ["", "small: ", "how ", "do ", "you ", "do", None]
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * 6
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 6 + ["stop"]
    assert {(c.object, c.model, c.id, c.created) for c in chunks} == {
        ("chat.completion.chunk", "tiny", chunks[0].id, chunks[0].created)
    }
    assert all("usage" not in c.model_fields_set for c in chunks)
    assert upstream.calls[0].wait().billed == Usage(4, 0, 5)


def test_usage_comes_last_where_it_is_wanted(client: OpenAI) -> None:
    wanted: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=wanted)
    assert all("usage" in c.model_fields_set and c.usage is None for c in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (4, 5, 9)


def test_the_wire_is_that_of_server_sent_events(upstream: Upstream) -> None:
    response = ask(upstream, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert lines[-2:] == ["data: [DONE]", ""]


def test_several_choices_cut_at_a_number_of_tokens(client: OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=HELLO, n=2)
    assert [c.message.content for c in made.choices] == ["small: how do you do", "small: how do you do #2"]
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        made = client.chat.completions.create(model="tiny", messages=HELLO, n=2, **limit)  # type: ignore[call-overload]
        assert [(c.message.content, c.finish_reason) for c in made.choices] == [("small: how ", "length")] * 2
        assert made.usage.completion_tokens == 4
    chunks = client.chat.completions.create(model="tiny", messages=HELLO, n=2, max_tokens=1, stream=True)
    assert {c.choices[0].index for c in chunks} == {0, 1}


def test_a_conversation_that_goes_on_is_cached(client: OpenAI, upstream: Upstream) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO)
    more: Any = [*HELLO, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "and now"}]
    second = client.chat.completions.create(model="tiny", messages=more)
    cached = [made.usage.prompt_tokens_details.cached_tokens for made in (first, second)]  # type: ignore[union-attr]
    assert cached == [0, 4]
    assert upstream.calls[1].wait().billed == Usage(7, 4, 3)


def test_a_tool_that_is_named_is_called(client: OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=ASK_WEATHER, tools=[CHAT_TOOL])
    choice = made.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "small: use get_weather for Oslo", "days": 1}

    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history: Any = [*ASK_WEATHER, choice.message.model_dump(exclude_none=True), result]
    made = client.chat.completions.create(model="tiny", messages=history, tools=[CHAT_TOOL])
    assert made.choices[0].message.content == "small: rain"


@pytest.mark.parametrize(
    ("content", "choice", "is_called"),
    [
        ("use get_weather", "none", False),
        ("hello", "auto", False),
        ("hello", "required", True),
        ("hello", {"type": "function", "function": {"name": "get_weather"}}, True),
    ],
)
def test_the_choice_of_tools(client: OpenAI, content: str, choice: Any, is_called: bool) -> None:
    messages: Any = [{"role": "user", "content": content}]
    made = client.chat.completions.create(model="tiny", messages=messages, tools=[CHAT_TOOL], tool_choice=choice)
    assert (made.choices[0].message.tool_calls is not None) == is_called


def test_a_tools_call_is_streamed_in_pieces(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=ASK_WEATHER, tools=[CHAT_TOOL]) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        made = stream.get_final_completion()
    assert len(pieces) > 3
    assert made.choices[0].message.tool_calls is not None
    (call,) = made.choices[0].message.tool_calls
    assert "".join(pieces) == call.function.arguments
    assert json.loads(call.function.arguments)["days"] == 1
    assert made.choices[0].finish_reason == "tool_calls"


def test_json_is_answered_with_json(client: OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"})
    assert json.loads(made.choices[0].message.content or "") == {"answer": "small: how do you do"}
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=City)
    city = parsed.choices[0].message.parsed
    assert city is not None
    assert city == City(name="small: how do you do", people=1, rivers=[River(length_km=1.5, is_in="valley")], twin=None)


def test_responses(client: OpenAI, upstream: Upstream) -> None:
    made = client.responses.create(model="tiny", input="how do you do", instructions="be kind")
    assert (made.output_text, made.status, made.model) == ("small: how do you do", "completed", "tiny")
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (6, 5, 11)
    assert upstream.calls[0].wait().billed == Usage(6, 0, 5)

    cut = client.responses.create(model="tiny", input=HELLO, max_output_tokens=2)
    assert (cut.output_text, cut.status) == ("small: how ", "incomplete")
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    parsed = client.responses.parse(model="tiny", input=HELLO, text_format=City)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.people == 1


def test_responses_streamed(client: OpenAI, upstream: Upstream) -> None:
    events = list(client.responses.create(model="tiny", input="how are", stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "small: how are"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "small: how are"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 3
    assert upstream.calls[0].wait().billed == Usage(2, 0, 3)


def test_responses_call_tools_in_pieces(client: OpenAI) -> None:
    tool: Any = {"type": "function", "strict": False, **WEATHER}
    with client.responses.stream(model="tiny", input="use get_weather for Oslo", tools=[tool]) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        made: Response = stream.get_final_response()
    (call,) = made.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", "".join(pieces))
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    history: Any = [*ASK_WEATHER, call.model_dump(exclude_none=True), output]
    assert client.responses.create(model="tiny", input=history, tools=[tool]).output_text == "small: rain"


def test_models(client: OpenAI, upstream: Upstream) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.chat.completions.create(model="auto", messages=HELLO).model == "tiny"
    assert [call.path for call in upstream.completions] == ["/v1/chat/completions"]


def test_a_wrong_key_is_refused(upstream: Upstream) -> None:
    with OpenAI(base_url=upstream.url, api_key="sk-other") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert upstream.calls[0].key_matched is False


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "tiny"}, "messages", "missing_required_parameter"),
        ({"messages": []}, "model", "missing_required_parameter"),
        ({"model": "tiny", "messages": "hi"}, "messages", "invalid_type"),
        ({"model": "tiny", "messages": [{}]}, None, None),
        ({"model": "tiny", "messages": [{"role": "user", "content": 5}]}, None, "invalid_type"),
        ({"model": "tiny", "messages": [], "max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"model": "tiny", "messages": [], "stream_options": {}}, "stream_options", None),
        ([], None, None),
    ],
)
def test_what_openai_refuses_is_refused(upstream: Upstream, body: Any, param: str | None, code: str | None) -> None:
    response = httpx.post(f"{upstream.url}/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "error", "code"),
    [
        (Fault.BAD_REQUEST, openai.BadRequestError, "context_length_exceeded"),
        (Fault.UNAUTHORIZED, openai.AuthenticationError, "invalid_api_key"),
        (Fault.NOT_FOUND, openai.NotFoundError, "model_not_found"),
        (Fault.RATE_LIMIT, openai.RateLimitError, "rate_limit_exceeded"),
        (Fault.NO_QUOTA, openai.RateLimitError, "insufficient_quota"),
        (Fault.ERROR, openai.InternalServerError, None),
        (Fault.OVERLOADED, openai.InternalServerError, None),
    ],
)
def test_errors_are_the_clients_own(
    client: OpenAI, upstream: Upstream, fault: Fault, error: type[openai.APIStatusError], code: str | None, stream: bool
) -> None:
    upstream.faults(fault, fault)
    with pytest.raises(error) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert caught.value.code == code
    waits = fault in (Fault.RATE_LIMIT, Fault.OVERLOADED)
    assert caught.value.response.headers.get("retry-after") == ("1" if waits else None)
    with pytest.raises(error):
        client.responses.create(model="tiny", input="hello", stream=stream)
    assert [call.wait().billed for call in upstream.calls] == [None, None]
    assert str(upstream.calls[0].status) == {"quota": "429"}.get(fault, fault)


@pytest.mark.parametrize("fault", [Fault.ERROR_FIRST, Fault.ERROR_MIDWAY])
def test_an_error_in_a_stream_is_the_clients_own(client: OpenAI, upstream: Upstream, fault: Fault) -> None:
    upstream.faults(fault, fault)
    with pytest.raises(openai.APIError, match="The server failed"):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    *_, last = client.responses.create(model="tiny", input="how do you do", stream=True)
    assert last.type == "error"
    assert last.message == "The server failed."
    billed = None if fault is Fault.ERROR_FIRST else Usage(4, 0, 3)
    assert upstream.calls[0].wait().billed == billed


def test_the_client_tries_again(upstream: Upstream) -> None:
    upstream.retry_after_s = 0
    upstream.faults(Fault.RATE_LIMIT, Fault.RESET)
    with OpenAI(base_url=upstream.url, api_key=KEY, max_retries=2) as patient:
        made = patient.chat.completions.create(model="tiny", messages=HELLO)
    assert made.choices[0].message.content == "small: how do you do"
    assert [call.wait().fault for call in upstream.calls] == [Fault.RATE_LIMIT, Fault.RESET, None]
    assert [call.wait().status for call in upstream.calls] == [429, 0, 200]


@pytest.mark.parametrize(
    ("fault", "last_line", "completion_tokens"),
    [
        (Fault.CUT, '"delta":{"content":"one "}', 2),
        (Fault.TRUNCATED, 'data: {"id"', 2),
        (Fault.NOT_JSON, "data: warming up", None),
        (Fault.EMPTY, "", None),
        (Fault.WRONG_TYPE, "data: [DONE]", 4),
        (Fault.NOT_STREAMED, '"object":"chat.completion"', 4),
    ],
)
def test_streams_that_go_wrong_in_good_order(
    upstream: Upstream, fault: Fault, last_line: str, completion_tokens: int | None
) -> None:
    upstream.faults(fault)
    response = ask(upstream, stream=True)
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert last_line in last
    assert ("[DONE]" in response.text) == (fault is Fault.WRONG_TYPE)
    kind = response.headers["content-type"].partition(";")[0]
    expected = {Fault.WRONG_TYPE: "text/html", Fault.NOT_STREAMED: "application/json"}
    assert kind == expected.get(fault, "text/event-stream")
    if fault is Fault.TRUNCATED:
        with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
            json.loads(last.removeprefix("data: "))
    billed = upstream.calls[0].wait().billed
    assert (billed and billed.completion_tokens) == completion_tokens


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.TRUNCATED, Fault.NOT_JSON, Fault.EMPTY])
def test_bodies_that_are_no_json(client: OpenAI, upstream: Upstream, fault: Fault) -> None:
    upstream.faults(fault, fault)
    response = ask(upstream)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        response.json()
    with pytest.raises((openai.APIResponseValidationError, ValueError)):
        client.chat.completions.create(model="tiny", messages=HELLO)


def test_a_wrong_content_type_and_an_error_with_status_200(upstream: Upstream) -> None:
    upstream.faults(Fault.WRONG_TYPE, Fault.ERROR_FIRST)
    response = ask(upstream)
    assert response.headers["content-type"] == "text/html"
    assert response.json()["choices"][0]["message"]["content"] == "small: one two three"
    response = ask(upstream)
    assert response.status_code == 200
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_connections_are_reset(client: OpenAI, upstream: Upstream, stream: bool) -> None:
    upstream.faults(Fault.RESET, Fault.RESET_MIDWAY, Fault.RESET_MIDWAY)
    with pytest.raises(httpx.ReadError):
        ask(upstream, stream)
    assert (upstream.calls[0].wait().status, upstream.calls[0].billed) == (0, None)
    seen: list[str] = []
    with pytest.raises(httpx.ReadError), asking(upstream, stream) as response:
        seen.extend(response.iter_text())
    assert ('"content":"one "' in "".join(seen)) == stream
    assert upstream.calls[1].wait().billed == Usage(3, 0, 2 if stream else 4)
    assert not upstream.calls[1].client_left
    with pytest.raises(openai.APIConnectionError):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=stream))  # type: ignore[call-overload]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [Fault.HANG, Fault.STALL, Fault.SLOW_HEAD, Fault.SLOW_CHUNKS])
def test_who_waits_too_long_is_seen_to_leave(upstream: Upstream, fault: Fault, stream: bool) -> None:
    upstream.faults(fault)
    upstream.slow_s = 5
    hasty = OpenAI(base_url=upstream.url, api_key=KEY, max_retries=0, timeout=0.3)
    with hasty, pytest.raises(openai.APITimeoutError):
        list(hasty.chat.completions.create(model="tiny", messages=HELLO, stream=stream))  # type: ignore[call-overload]
    call = upstream.calls[0].wait()
    assert call.client_left
    assert 0.2 < call.took_s < 3
    tokens = {Fault.STALL: 3, Fault.SLOW_CHUNKS: 0}
    if fault in tokens:
        assert call.billed == Usage(4, 0, tokens[fault] if stream else 5)
    else:
        assert (call.status, call.billed) == (0, None)


def test_what_is_slow_comes_in_the_end(upstream: Upstream) -> None:
    upstream.slow_s, upstream.first_byte_s, upstream.between_chunks_s = 0.2, 0.1, 0.02
    upstream.faults(None, Fault.SLOW_HEAD, Fault.SLOW_CHUNKS)
    texts, times = set(), []
    for _ in range(3):
        start = time.monotonic()
        texts.add("".join(chunk for chunk in ask(upstream, stream=True).text.split('"content":')[1:])[:40])
        times.append(time.monotonic() - start)
    assert len(texts) == 1
    events = 6  # role, four pieces, the end
    assert times[0] >= 0.1 + 0.02 * (events - 1)
    assert times[1] >= 0.3 + 0.02 * (events - 1)
    assert times[2] >= 0.1 + 0.2 * events


def test_a_message_asks_for_its_fault(upstream: Upstream) -> None:
    assert ask(upstream, content="hi [[fault:503]]").status_code == 503
    assert ask(upstream, content="hi [[fault:503@big]]").status_code == 200
    assert ask(upstream, content="hi [[fault:503@big]] [[fault:429@small]]").status_code == 429


def test_faults_at_random_are_the_same_for_a_seed(upstream: Upstream) -> None:
    def draw(seed: int) -> list[int]:
        upstream.faults(Fault.ERROR, Fault.RATE_LIMIT, rate=0.4, seed=seed)
        return [ask(upstream).status_code for _ in range(40)]

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert set(first) == {200, 429, 500}
    assert 0.2 < sum(status != 200 for status in first) / 40 < 0.6
    upstream.faults()
    assert {ask(upstream).status_code for _ in range(20)} == {200}


def test_two_hundred_streams_at_once(upstream: Upstream) -> None:
    upstream.first_byte_s, upstream.between_chunks_s = 0.05, 0.05

    async def one(client: httpx.AsyncClient, number: int) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"{number} " * 20}], "stream": True}
        response = await client.post(f"{upstream.url}/chat/completions", json=body)
        return response.text

    async def all_of_them() -> list[str]:
        limits, headers = httpx.Limits(max_connections=None), {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(limits=limits, headers=headers, timeout=60) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    start = time.monotonic()
    texts = asyncio.run(all_of_them())
    took_s = time.monotonic() - start
    for number, text in enumerate(texts):
        assert text.count(f'"content":"{number}') == 20
        assert text.endswith("data: [DONE]\n\n")
    alone_s = 0.05 + 22 * 0.05
    assert took_s < 200 * alone_s / 10  # the streams ran concurrently
    assert len(upstream.calls) == 200
