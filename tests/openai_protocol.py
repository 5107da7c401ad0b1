"""The server side of OpenAI's protocol: parses requests, and builds response bodies and events.

Chat completions and responses differ only in format. Each has a reader, which parses a request's body to a `Prompt`,
and a `Reply`, which formats `Answer`s as a body or as events. Fields follow OpenAI's API reference.
"""

from __future__ import annotations

import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

Json = dict[str, Any]


class BadRequest(Exception):  # noqa: N818
    """A request that OpenAI refuses with 400."""

    def __init__(self, message: str, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.body = error_body(message, "invalid_request_error", code, param)


@dataclass(frozen=True)
class Prompt:
    """A parsed request of either API."""

    model: str
    messages: tuple[tuple[str, str], ...]  # (role, text); a tool's output has the role "tool"
    stream: bool
    include_usage: bool
    tools: Mapping[str, Json]  # the schema of each function's arguments
    must_call: str | None  # a tool that must be called
    schema: Json | None  # of the requested JSON, None for text
    max_tokens: int | None
    n: int = 1

    @property
    def last_user_text(self) -> str:
        return next((text for role, text in reversed(self.messages) if role == "user"), "")


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # included in prompt_tokens
    completion_tokens: int

    def chat(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def responses(self) -> Json:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Answer:
    """A choice: text or tool calls. A piece is a word with the space after it, and counts as one token."""

    pieces: Sequence[str]
    calls: Sequence[tuple[str, Sequence[str]]]  # name, and pieces of the arguments' JSON
    is_cut: bool  # by `max_tokens`

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def num_tokens(self) -> int:
        return len(self.pieces) + sum(len(arguments) for _name, arguments in self.calls)


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    data: Json
    num_tokens: int = 0  # tokens of the answer in this event
    name: str = ""

    def encode(self) -> bytes:
        return (f"event: {self.name}\n" if self.name else "").encode() + b"data: " + encode(self.data) + b"\n\n"


def encode(body: Json) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read_chat(body: Json) -> Prompt:
    """Raises BadRequest."""
    messages = _required(body, "messages", list)
    if "stream_options" in body and not body.get("stream"):
        raise BadRequest("'stream_options' is only allowed with 'stream'.", "stream_options")
    tools = {t["function"]["name"]: t["function"].get("parameters", {}) for t in body.get("tools") or ()}
    choice = body.get("tool_choice", "auto")
    return Prompt(
        model=_required(body, "model", str),
        messages=tuple((message["role"], _text(message.get("content"))) for message in messages),
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        tools={} if choice == "none" else tools,
        must_call=_must_call(choice, choice["function"]["name"] if isinstance(choice, dict) else None, tools),
        schema=_wanted_schema(body.get("response_format"), "json_schema"),
        max_tokens=_limit(body, "max_completion_tokens", "max_tokens"),
        n=_choices(body),
    )


def read_responses(body: Json) -> Prompt:
    """Raises BadRequest."""
    given = _required(body, "input", (str, list))
    messages = [("system", body["instructions"])] if body.get("instructions") else []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        if item.get("type") == "function_call_output":
            messages.append(("tool", _text(item["output"])))
        elif "role" in item:
            messages.append((item["role"], _text(item["content"])))
    tools = {t["name"]: t.get("parameters") or {} for t in body.get("tools") or () if t["type"] == "function"}
    choice = body.get("tool_choice", "auto")
    return Prompt(
        model=_required(body, "model", str),
        messages=tuple(messages),
        stream=bool(body.get("stream")),
        include_usage=True,
        tools={} if choice == "none" else tools,
        must_call=_must_call(choice, choice.get("name") if isinstance(choice, dict) else None, tools),
        schema=_wanted_schema((body.get("text") or {}).get("format"), None),
        max_tokens=_limit(body, "max_output_tokens"),
    )


def answer(name: str, prompt: Prompt, index: int = 0) -> Answer:
    """The answer of upstream `name`: its name and the last text, or JSON or a tool call if the prompt requests one.

    It calls a tool if the last message is the user's and contains the tool's name. Choices after the first end with
    their number.
    """
    role, last = prompt.messages[-1] if prompt.messages else ("user", "")
    text = f"{name}: {last or 'nothing was asked'}" + (f" #{index + 1}" if index else "")
    called = [tool for tool in prompt.tools if role == "user" and tool in last]
    if not called and prompt.must_call and role == "user":
        called = [prompt.must_call]
    if called:
        calls = [(tool, _pieces(json.dumps(_instance(prompt.tools[tool], text)))) for tool in called]
        return Answer([], calls, is_cut=False)
    pieces = _pieces(text if prompt.schema is None else json.dumps(_instance(prompt.schema, text)))
    return Answer(pieces[: prompt.max_tokens], [], is_cut=len(pieces) > (prompt.max_tokens or len(pieces)))


@dataclass
class Reply(ABC):
    """The answers to a request in the format of its API."""

    id: str
    created: int  # seconds since 1970
    model: str
    prompt: Prompt
    asked: Json  # the request's body
    answers: Sequence[Answer]
    usage: Usage

    end: ClassVar[bytes] = b""  # what follows the last event

    @abstractmethod
    def body(self) -> Json: ...

    @abstractmethod
    def events(self) -> Iterator[Event]: ...

    @abstractmethod
    def error(self, body: Json, place: int, /) -> Event:
        """The event that replaces event number `place` if the stream fails there."""


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    end = b"data: [DONE]\n\n"

    def body(self) -> Json:
        choices = []
        for index, answer in enumerate(self.answers):
            message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
            if answer.calls:
                calls = [self._call(n, name, "".join(arguments)) for n, (name, arguments) in enumerate(answer.calls)]
                message |= {"content": None, "tool_calls": calls}
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": _reason(answer)})
        return self._head("chat.completion") | {"choices": choices, "usage": self.usage.chat()}

    def events(self) -> Iterator[Event]:
        for index, answer in enumerate(self.answers):
            yield self._event(index, {"role": "assistant", "content": None if answer.calls else "", "refusal": None})
            for piece in answer.pieces:
                yield self._event(index, {"content": piece}, 1)
            for number, (name, arguments) in enumerate(answer.calls):
                yield self._event(index, {"tool_calls": [{"index": number, **self._call(number, name, "")}]})
                for piece in arguments:
                    yield self._event(index, {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}, 1)
            yield self._event(index, {}, reason=_reason(answer))
        if self.prompt.include_usage:
            yield Event(self._chunk() | {"choices": [], "usage": self.usage.chat()})

    def error(self, body: Json, _place: int, /) -> Event:
        return Event(body)

    def _event(self, index: int, delta: Json, num_tokens: int = 0, reason: str | None = None) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return Event(self._chunk() | {"choices": [choice]}, num_tokens)

    def _chunk(self) -> Json:
        return self._head("chat.completion.chunk") | ({"usage": None} if self.prompt.include_usage else {})

    def _head(self, kind: str) -> Json:
        head = {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return head | {"service_tier": "default", "system_fingerprint": "fp_0"}

    def _call(self, number: int, name: str, arguments: str) -> Json:
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{self.id}_{number}", "type": "function", "function": function}


class ResponsesReply(Reply):
    """POST /v1/responses."""

    def body(self, status: str = "") -> Json:
        """The finished response, or one with another `status` and no output yet."""
        is_done, is_cut = not status, self._answer.is_cut
        items = [self._item(n) for n in range(len(self._answer.calls) or 1)]
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status or ("incomplete" if is_cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_done and is_cut else None,
            "instructions": self.asked.get("instructions"),
            "max_output_tokens": self.asked.get("max_output_tokens"),
            "metadata": self.asked.get("metadata") or {},
            "model": self.model,
            "output": items if is_done else [],
            "parallel_tool_calls": self.asked.get("parallel_tool_calls", True),
            "previous_response_id": self.asked.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None},
            "store": self.asked.get("store", True),
            "temperature": self.asked.get("temperature", 1.0),
            "text": self.asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": self.asked.get("tool_choice", "auto"),
            "tools": self.asked.get("tools") or [],
            "top_p": self.asked.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": self.usage.responses() if is_done else None,
        }

    def events(self) -> Iterator[Event]:
        opened = self.body("in_progress")
        events = [Event({"response": opened}, name=f"response.{name}") for name in ("created", "in_progress")]
        if self._answer.calls:
            for number, (_name, arguments) in enumerate(self._answer.calls):
                events += self._call_events(number, arguments)
        else:
            events += self._text_events()
        done = self.body()
        events.append(Event({"response": done}, name=f"response.{done['status']}"))
        for place, event in enumerate(events):
            yield self._placed(event, place)

    def error(self, body: Json, place: int, /) -> Event:
        fields = {key: body["error"][key] for key in ("code", "message", "param")}
        return self._placed(Event(fields, name="error"), place)

    @property
    def _answer(self) -> Answer:
        return self.answers[0]

    def _placed(self, event: Event, place: int) -> Event:
        return replace(event, data={"type": event.name, "sequence_number": place, **event.data})

    def _text_events(self) -> Iterator[Event]:
        item = self._item(0)
        part = item["content"][0]
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        opened = item | {"status": "in_progress", "content": []}
        yield _event("response.output_item.added", output_index=0, item=opened)
        yield _event("response.content_part.added", **place, part=part | {"text": ""})
        for piece in self._answer.pieces:
            yield _event("response.output_text.delta", 1, **place, delta=piece, logprobs=[])
        yield _event("response.output_text.done", **place, text=self._answer.text, logprobs=[])
        yield _event("response.content_part.done", **place, part=part)
        yield _event("response.output_item.done", output_index=0, item=item)

    def _call_events(self, number: int, arguments: Sequence[str]) -> Iterator[Event]:
        item = self._item(number)
        place = {"item_id": item["id"], "output_index": number}
        opened = item | {"status": "in_progress", "arguments": ""}
        yield _event("response.output_item.added", output_index=number, item=opened)
        for piece in arguments:
            yield _event("response.function_call_arguments.delta", 1, **place, delta=piece)
        whole = "".join(arguments)
        yield _event("response.function_call_arguments.done", **place, name=item["name"], arguments=whole)
        yield _event("response.output_item.done", output_index=number, item=item)

    def _item(self, number: int) -> Json:
        if self._answer.calls:
            name, arguments = self._answer.calls[number]
            return {
                "type": "function_call",
                "id": f"fc_{self.id}_{number}",
                "call_id": f"call_{self.id}_{number}",
                "name": name,
                "arguments": "".join(arguments),
                "status": "completed",
            }
        return {
            "type": "message",
            "id": f"msg_{self.id}",
            "role": "assistant",
            "status": "incomplete" if self._answer.is_cut else "completed",
            "content": [{"type": "output_text", "text": self._answer.text, "annotations": [], "logprobs": []}],
        }


def _event(name: str, num_tokens: int = 0, /, **fields: Any) -> Event:
    return Event(fields, num_tokens, name)


def _required(body: Json, name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in body:
        raise BadRequest(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if not isinstance(body[name], kind):
        raise BadRequest(f"Invalid type for '{name}'.", name, "invalid_type")
    return body[name]


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if "text" in part)
    if not isinstance(content, str | None):
        raise BadRequest("Invalid type for 'content'.", None, "invalid_type")
    return content or ""


def _limit(body: Json, *names: str) -> int | None:
    """The first of these token limits that is set."""
    name = next((name for name in names if body.get(name) is not None), None)
    if name is None:
        return None
    if not isinstance(body[name], int) or body[name] < 1:
        raise BadRequest(f"'{name}' must be an integer of at least 1.", name, "integer_below_min_value")
    return int(body[name])


def _choices(body: Json) -> int:
    n = body.get("n")
    if n is not None and (not isinstance(n, int) or not 1 <= n <= 128):
        raise BadRequest("'n' must be an integer from 1 to 128.", "n")
    return n or 1


def _must_call(choice: Any, name: str | None, tools: Mapping[str, Json]) -> str | None:
    return next(iter(tools), None) if choice == "required" else name


def _wanted_schema(form: Json | None, key: str | None) -> Json | None:
    """The schema of a `response_format` or `text.format`, which has it under `key` or at the top."""
    kind = (form or {}).get("type")
    if form is None or kind not in ("json_object", "json_schema"):
        return None
    if kind == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    schema: Json = (form[key] if key else form)["schema"]
    return schema


def _instance(schema: Json, text: str, root: Json | None = None) -> Any:
    """A value that matches a schema of structured outputs; its strings are `text`."""
    root = root or schema
    if "$ref" in schema:
        schema = functools.reduce(lambda part, name: part[name], schema["$ref"].split("/")[1:], root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if "anyOf" in schema:
        return _instance(schema["anyOf"][-1], text, root)  # null if allowed, which ends a recursive schema
    kind = schema.get("type", "object" if "properties" in schema else None)
    if kind == "object":
        return {name: _instance(part, text, root) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [_instance(schema.get("items", {}), text, root)]
    return {"string": text, "integer": 1, "number": 1.5, "boolean": True}.get(
        kind[0] if isinstance(kind, list) else kind
    )


def _pieces(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text)


def _reason(answer: Answer) -> str:
    return "tool_calls" if answer.calls else "length" if answer.is_cut else "stop"
