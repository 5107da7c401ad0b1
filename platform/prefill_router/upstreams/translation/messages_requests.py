"""Translates the request of a chat completion to one of Anthropic's Messages."""

from __future__ import annotations

import re
from typing import Any

from prefill_router.upstreams.translation.untranslatable import (
    Body,
    DroppedFields,
    TranslatedRequest,
    Untranslatable,
    a_string,
    an_object,
    objects,
    parsed_arguments,
    require_none,
)

ANSWER_TOKENS = 8192  # Messages require a limit; chat completions without one get this

_SAME = ("model", "stream", "temperature", "top_p", "top_k")
_TRANSLATED = (
    *("messages", "stream_options", "max_tokens", "max_completion_tokens", "stop", "n", "modalities"),
    *("tools", "tool_choice", "parallel_tool_calls", "response_format"),
)
_UNSUPPORTED = (
    *("logprobs", "top_logprobs", "logit_bias", "audio", "prediction", "web_search_options", "functions"),
    "function_call",
)
_OF_A_MESSAGE = ("role", "content", "tool_calls", "tool_call_id", "refusal")
_TOOL_ID = re.compile(r"[a-zA-Z0-9_-]+")
_DATA_URL = re.compile(r"data:(image/[\w.+-]+);base64,(.*)", re.DOTALL)
_CHOICES = {"auto": "auto", "none": "none", "required": "any"}


def messages_request(chat: Body) -> TranslatedRequest:
    """Translates a request. Raises Untranslatable. Without a limit on the answer, `max_tokens` is left out."""
    dropped = DroppedFields()
    _require_supported(chat)
    body = {name: chat[name] for name in _SAME if chat.get(name) is not None}
    if limit := chat.get("max_completion_tokens") or chat.get("max_tokens"):
        body["max_tokens"] = limit
    if stop := chat.get("stop"):
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    system, body["messages"] = _conversation(objects(chat.get("messages"), "messages"), dropped)
    if system:
        body["system"] = system
    if tools := chat.get("tools"):
        body["tools"] = [_tool(tool, dropped) for tool in objects(tools, "tools")]
        body |= _tool_choice(chat)
    if output := _output_format(chat.get("response_format")):
        body["output_config"] = {"format": output}
    dropped.add_others(chat, (*_SAME, *_TRANSLATED))
    return TranslatedRequest(body, dropped.names)


def _require_supported(chat: Body) -> None:
    require_none(chat, _UNSUPPORTED)
    if chat.get("n") not in (None, 1):
        raise Untranslatable("n: more than one answer")
    if chat.get("modalities") not in (None, ["text"]):
        raise Untranslatable("modalities")
    temperature = chat.get("temperature")
    if isinstance(temperature, int | float) and temperature > 1:
        raise Untranslatable("temperature: above 1")


def _conversation(messages: list[Body], dropped: DroppedFields) -> tuple[list[Body], list[Body]]:
    """Returns the blocks of `system`, and the messages with neighbours of one role merged."""
    system: list[Body] = []
    turns: list[Body] = []
    for place, message in enumerate(messages):
        role, name = message.get("role"), f"messages[{place}]"
        require_none(message, ("function_call", "audio"))
        dropped.add_others(message, _OF_A_MESSAGE, "messages.")
        if role in ("system", "developer"):
            if turns:
                raise Untranslatable(f"{name}: a {role} message after the first turn")
            system += _text_blocks(message.get("content"), name)
        elif role == "user":
            _append(turns, "user", _blocks(message.get("content"), name, dropped))
        elif role == "assistant":
            _append(turns, "assistant", _answer_blocks(message, name, dropped))
        elif role == "tool":
            _append(turns, "user", [_tool_result(message, name, dropped)])
        else:
            raise Untranslatable(f"{name}.role")
    if turns and turns[-1]["role"] == "assistant":
        raise Untranslatable("messages: the last one is the assistant's")
    return system, turns


def _append(turns: list[Body], role: str, blocks: list[Body]) -> None:
    """Appends blocks, to the last message if its role is the same: results of parallel calls share a message."""
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += blocks
    elif blocks:
        turns.append({"role": role, "content": blocks})


def _answer_blocks(message: Body, name: str, dropped: DroppedFields) -> list[Body]:
    blocks = [*_blocks(message.get("content"), name, dropped), *_blocks(message.get("refusal"), name, dropped)]
    for call in objects(message.get("tool_calls") or [], f"{name}.tool_calls"):
        function = an_object(call.get("function"), f"{name}.tool_calls.function")
        arguments = parsed_arguments(function.get("arguments"), f"{name}.tool_calls.arguments")
        called = {"id": _tool_id(call.get("id"), name), "name": function.get("name"), "input": arguments}
        blocks.append({"type": "tool_use", **called})
    return blocks


def _tool_result(message: Body, name: str, dropped: DroppedFields) -> Body:
    content = message.get("content")
    given = content if isinstance(content, str) else _blocks(content, name, dropped)
    return {"type": "tool_result", "tool_use_id": _tool_id(message.get("tool_call_id"), name), "content": given}


def _tool_id(given: Any, name: str) -> str:
    if not isinstance(given, str) or not _TOOL_ID.fullmatch(given):
        raise Untranslatable(f"{name}: a tool call's id with other characters than letters, digits, _ and -")
    return given


def _text_blocks(content: Any, name: str) -> list[Body]:
    blocks = _blocks(content, name, DroppedFields())
    if any(block["type"] != "text" for block in blocks):
        raise Untranslatable(f"{name}.content: not text")
    return blocks


def _blocks(content: Any, name: str, dropped: DroppedFields) -> list[Body]:
    """The blocks of a content. Empty texts are left out, since Messages refuse them."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [block for part in objects(content, f"{name}.content") if (block := _block(part, name, dropped))]


def _block(part: Body, name: str, dropped: DroppedFields) -> Body | None:
    kind = part.get("type")
    cached = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
    if kind in ("text", "refusal"):
        text = a_string(part.get(kind), f"{name}.content.{kind}")
        return {"type": "text", "text": text, **cached} if text else None
    if kind == "image_url":
        return {"type": "image", "source": _image_source(part.get("image_url"), name, dropped), **cached}
    raise Untranslatable(f"{name}.content: a part of type {kind}")


def _image_source(image: Any, name: str, dropped: DroppedFields) -> Body:
    image = image if isinstance(image, dict) else {"url": image}
    dropped.add_others(image, ("url",), "image_url.")
    url = a_string(image.get("url"), f"{name}.content.image_url")
    if inline := _DATA_URL.fullmatch(url):
        return {"type": "base64", "media_type": inline[1], "data": inline[2]}
    if not url.startswith(("https://", "http://")):
        raise Untranslatable(f"{name}.content.image_url: neither an image in base64 nor a web address")
    return {"type": "url", "url": url}


def _tool(tool: Body, dropped: DroppedFields) -> Body:
    if tool.get("type") != "function":
        raise Untranslatable(f"tools: one of type {tool.get('type')}")
    function = an_object(tool.get("function"), "tools.function")
    dropped.add_others(function, ("name", "description", "parameters", "strict"), "tools.")
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    same = {name: function[name] for name in ("name", "description", "strict") if function.get(name) is not None}
    return {**same, "input_schema": schema}


def _tool_choice(chat: Body) -> Body:
    given = chat.get("tool_choice")
    choice: Body = {"type": "auto"}
    if isinstance(given, dict) and given.get("type") == "function":
        choice = {"type": "tool", "name": an_object(given.get("function"), "tool_choice.function").get("name")}
    elif isinstance(given, str) and given in _CHOICES:
        choice = {"type": _CHOICES[given]}
    elif given is not None:
        raise Untranslatable("tool_choice")
    if chat.get("parallel_tool_calls") is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tool_choice": choice} if given is not None or len(choice) > 1 else {}


def _output_format(given: Any) -> Body | None:
    if given is None or given == {"type": "text"}:
        return None
    schema = given.get("json_schema") if isinstance(given, dict) and given.get("type") == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise Untranslatable("response_format")
    return {"type": "json_schema", "schema": schema["schema"]}
