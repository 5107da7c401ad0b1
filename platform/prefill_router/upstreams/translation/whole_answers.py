"""Translates whole answers, stop reasons and usage."""

from __future__ import annotations

from time import time
from typing import Any

from prefill_router.common.usage import Usage, read_usage
from prefill_router.upstreams.translation.untranslatable import (
    Body,
    Untranslatable,
    a_string,
    an_object,
    objects,
    parsed_arguments,
    written_arguments,
)

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


def chat_answer(message: Body) -> Body:
    """A message of Anthropic's as a chat completion. Raises Untranslatable, also for a malformed answer."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Body] = []
    for block in objects(message.get("content"), "content"):
        kind = block.get("type")
        if kind == "text":
            texts.append(a_string(block.get("text"), "content.text"))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": written_arguments(block.get("input"), "content.input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(a_string(block.get("thinking"), "content.thinking"))
        elif kind != "redacted_thinking":
            raise Untranslatable(f"content: a block of type {kind}")
    said: Body = {"role": "assistant", "content": "".join(texts) if texts or not calls else None, "refusal": None}
    said |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    said |= {"tool_calls": calls} if calls else {}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": finish_reason(message.get("stop_reason"))}
    head = {"id": message.get("id"), "object": "chat.completion", "created": int(time()), "model": message.get("model")}
    return {**head, "choices": [choice], "usage": chat_usage(message.get("usage"))}


def messages_answer(chat: Body) -> Body:
    """A chat completion as a message of Anthropic's. Raises Untranslatable, also for a malformed answer."""
    choices = objects(chat.get("choices"), "choices")
    said = an_object(choices[0].get("message") if choices else None, "choices.message")
    texts = [said.get("content") or "", said.get("refusal") or ""]
    blocks: list[Body] = [{"type": "text", "text": a_string(text, "content")} for text in texts if text]
    for call in objects(said.get("tool_calls") or [], "tool_calls"):
        function = an_object(call.get("function"), "tool_calls.function")
        arguments = parsed_arguments(function.get("arguments"), "tool_calls.arguments")
        blocks.append({"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": arguments})
    called = any(block["type"] == "tool_use" for block in blocks)
    return {
        **message_head(chat),
        "content": blocks,
        "stop_reason": stop_reason(choices[0].get("finish_reason"), called=called),
        "stop_sequence": None,
        "usage": messages_usage(chat.get("usage")),
    }


def message_head(chat: Body) -> Body:
    """The first fields of a message, from a chat completion or one of its chunks."""
    return {"id": chat.get("id") or "", "type": "message", "role": "assistant", "model": chat.get("model") or ""}


def finish_reason(given: Any) -> str:
    return _FINISH_REASONS.get(given, "stop") if isinstance(given, str) else "stop"


def stop_reason(given: Any, *, called: bool) -> str:
    """`called`: the answer has tool calls, which some servers end with "stop"."""
    reason = _STOP_REASONS.get(given, "end_turn") if isinstance(given, str) else "end_turn"
    return "tool_use" if called and reason == "end_turn" else reason


def chat_usage(given: Any) -> Body | None:
    """Usage of a chat completion, whose prompt tokens include those written to and read from a cache.

    None if the message reports none.
    """
    usage = read_usage(given)
    if usage is None:
        return None
    prompt, answer = usage.input_tokens, usage.output_tokens
    details = {"cached_tokens": usage.cached_tokens, "cache_write_tokens": usage.cache_write_tokens}
    totals = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {**totals, "prompt_tokens_details": details}


def messages_usage(given: Any) -> Body:
    """Usage of a message, whose input tokens exclude those written to and read from a cache; 0 if none is reported."""
    usage = read_usage(given) or Usage(0, 0)
    written, cached = usage.cache_write_tokens, usage.cached_tokens
    return {
        "input_tokens": usage.input_tokens - written - cached,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_tokens,
    }
