"""Translates the request of Anthropic's Messages to one of a chat completion."""

from __future__ import annotations

from typing import Any

from prefill_router.upstreams.translation.untranslatable import (
    Body,
    DroppedFields,
    TranslatedRequest,
    Untranslatable,
    a_string,
    an_object,
    objects,
    require_none,
    written_arguments,
)

_SAME = ("model", "stream", "max_tokens", "temperature", "top_p")
_TRANSLATED = ("messages", "system", "stop_sequences", "tools", "tool_choice", "output_config")
_UNSUPPORTED = ("container", "mcp_servers", "prefill")
_MOST_STOPS = 4
_MOST_OF_A_NAME = 64  # characters of a function's name
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
_THINKING = ("thinking", "redacted_thinking")


def chat_request(messages: Body) -> TranslatedRequest:
    """Translates a request. Raises Untranslatable. The limit keeps its name, `max_tokens`."""
    dropped = DroppedFields()
    require_none(messages, _UNSUPPORTED)
    body = {name: messages[name] for name in _SAME if messages.get(name) is not None}
    if stop := messages.get("stop_sequences"):
        if not isinstance(stop, list) or len(stop) > _MOST_STOPS:
            raise Untranslatable(f"stop_sequences: more than {_MOST_STOPS}")
        body["stop"] = stop
    body["messages"] = _conversation(messages, dropped)
    if tools := messages.get("tools"):
        body["tools"] = [_function(tool, dropped) for tool in objects(tools, "tools")]
    if choice := messages.get("tool_choice"):
        body |= _tool_choice(an_object(choice, "tool_choice"))
    if output := messages.get("output_config"):
        body |= _response_format(an_object(output, "output_config"), dropped)
    dropped.add_others(messages, (*_SAME, *_TRANSLATED))
    return TranslatedRequest(body, dropped.names)


def _conversation(messages: Body, dropped: DroppedFields) -> list[Body]:
    given = objects(messages.get("messages"), "messages")
    said: list[Body] = []
    if system := messages.get("system"):
        said.append({"role": "system", "content": _content(_texts(system, "system", dropped))})
    for place, message in enumerate(given):
        role, name = message.get("role"), f"messages[{place}]"
        dropped.add_others(message, ("role", "content"), "messages.")
        if role == "assistant":
            said.append(_answer(_blocks(message, name), name, dropped))
        elif role == "user":
            said += _user_messages(_blocks(message, name), name, dropped)
        elif role == "system":
            said.append({"role": "system", "content": _content(_texts(message.get("content"), name, dropped))})
        else:
            raise Untranslatable(f"{name}.role")
    if given and given[-1].get("role") == "assistant":
        raise Untranslatable("messages: the last one begins the answer")
    return said


def _blocks(message: Body, name: str) -> list[Body]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else objects(content, f"{name}.content")


def _answer(blocks: list[Body], name: str, dropped: DroppedFields) -> Body:
    texts: list[str] = []
    calls: list[Body] = []
    for block in blocks:
        kind = block.get("type")
        if kind in _THINKING:
            dropped.add("thinking")
        elif kind == "text":
            texts.append(_text(block, name, dropped)["text"])
        elif kind == "tool_use":
            calls.append(_tool_call(block, name, dropped))
        else:
            raise Untranslatable(f"{name}.content: a block of type {kind}")
    text = "".join(texts)
    called = {"content": text or None, "tool_calls": calls} if calls else {"content": text}
    return {"role": "assistant", **called}


def _tool_call(block: Body, name: str, dropped: DroppedFields) -> Body:
    if an_object(block.get("caller") or {"type": "direct"}, f"{name}.caller").get("type") != "direct":
        raise Untranslatable(f"{name}.content: a tool call by another tool")
    dropped.add_others(block, ("type", "id", "name", "input", "caller"), "tool_use.")
    arguments = written_arguments(block.get("input"), f"{name}.content.input")
    function = {"name": block.get("name"), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}


def _user_messages(blocks: list[Body], name: str, dropped: DroppedFields) -> list[Body]:
    """The results of tools, each a message, before what the user says."""
    results = [_tool_message(block, name, dropped) for block in blocks if block.get("type") == "tool_result"]
    parts = [_part(block, name, dropped) for block in blocks if block.get("type") != "tool_result"]
    return [*results, *([{"role": "user", "content": _content(parts)}] if parts else [])]


def _tool_message(block: Body, name: str, dropped: DroppedFields) -> Body:
    dropped.add_others(block, ("type", "tool_use_id", "content"), "tool_result.")
    content = _content(_texts(block.get("content") or "", f"{name}.tool_result", dropped))
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _texts(content: Any, name: str, dropped: DroppedFields) -> list[Body]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_text(block, name, dropped) for block in objects(content, name)]


def _content(parts: list[Body]) -> Any:
    """A single text as a string, which every server accepts."""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _text(block: Body, name: str, dropped: DroppedFields) -> Body:
    if block.get("type") != "text":
        raise Untranslatable(f"{name}: a block of type {block.get('type')}")
    dropped.add_others(block, ("type", "text"))
    return {"type": "text", "text": a_string(block.get("text"), f"{name}.text")}


def _part(block: Body, name: str, dropped: DroppedFields) -> Body:
    if block.get("type") != "image":
        return _text(block, name, dropped)
    dropped.add_others(block, ("type", "source"))
    source = an_object(block.get("source"), f"{name}.source")
    if source.get("type") == "url":
        url = a_string(source.get("url"), f"{name}.source.url")
    elif source.get("type") == "base64":
        data = a_string(source.get("data"), f"{name}.source.data")
        url = f"data:{source.get('media_type')};base64,{data}"
    else:
        raise Untranslatable(f"{name}.source: of type {source.get('type')}")
    return {"type": "image_url", "image_url": {"url": url}}


def _function(tool: Body, dropped: DroppedFields) -> Body:
    if tool.get("type") not in (None, "custom"):
        raise Untranslatable(f"tools: one of type {tool['type']}")
    if len(a_string(tool.get("name"), "tools.name")) > _MOST_OF_A_NAME:
        raise Untranslatable(f"tools.name: longer than {_MOST_OF_A_NAME} characters")
    dropped.add_others(tool, ("type", "name", "description", "input_schema", "strict"), "tools.")
    same = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {**same, "parameters": tool.get("input_schema")}}


def _tool_choice(choice: Body) -> Body:
    kind = choice.get("type")
    body: Body = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    if kind == "tool":
        return body | {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if str(kind) not in _CHOICES:
        raise Untranslatable("tool_choice")
    return body | {"tool_choice": _CHOICES[str(kind)]}


def _response_format(output: Body, dropped: DroppedFields) -> Body:
    dropped.add_others(output, ("format",), "output_config.")
    given = output.get("format")
    if given is None:
        return {}
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        raise Untranslatable("output_config.format")
    schema = {"name": "answer", "schema": given.get("schema"), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}
