"""Bodies in the shape of each provider's requests, as the router reads them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prefill_serve.provider_messages import chat_messages
from prefill_serve.wire import Question, RouteRequest
from served import Api

PNG = "iVBORw0KGgo="
SAID = [
    {"role": "system", "content": "You plan trips."},
    {"role": "user", "content": "How is the weather in Oslo?"},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": '{"degrees": 4, "sky": "blå"}'},
    {"role": "assistant", "content": "Cold."},
    {"role": "user", "content": "And on this photo?"},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}

CHAT = {
    "model": "auto",
    "messages": [
        {"role": "system", "content": "You plan trips."},
        {"role": "user", "content": "How is the weather in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 4, "sky": "blå"}'},
        {"role": "assistant", "content": "Cold."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And on this photo?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            ],
        },
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
    "stream": True,
}
OPENROUTER = {
    **CHAT,
    **dict.fromkeys(("plugins", "usage", "reasoning", "preset", "route", "trace", "session_id", "min_p", "top_a")),
    "provider": {"order": ["azure"], "max_price": {"prompt": 1}},
    "transforms": ["middle-out"],
}
LITELLM = {
    **CHAT,
    **dict.fromkeys(("mock_response", "guardrails", "drop_params", "extra_headers", "model_list", "prompt_id")),
    "fallbacks": [{"model": "gpt"}],
    "metadata": {"tags": ["a"]},
}
RESPONSE = {
    "model": "auto",
    "prompt": {"id": "pmpt_1", "variables": {"city": "Oslo"}},
    "instructions": "You plan trips.",
    "input": [
        {"type": "message", "role": "user", "content": "How is the weather in Oslo?"},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Oslo"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": '{"degrees": 4, "sky": "blå"}'},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Cold.", "annotations": []}]},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "And on this photo?"},
                {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
            ],
        },
    ],
    "previous_response_id": None,
    "include": ["reasoning.encrypted_content"],
}
MESSAGES = {
    "model": "auto",
    "max_tokens": 32_000,
    "system": [{"type": "text", "text": "You plan trips.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "How is the weather in Oslo?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Ask the tool.", "signature": "c2ln"},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": '{"degrees": 4, "sky": "blå"}'}],
                    "is_error": False,
                }
            ],
        },
        {"role": "assistant", "content": "Cold."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And on this photo?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
            ],
        },
    ],
    "tools": [{"name": "weather", "input_schema": SCHEMA}, {"type": "web_search_20250305", "name": "web_search"}],
    "thinking": {"type": "enabled", "budget_tokens": 8_000},
    "metadata": {"user_id": "u1"},
}
GEMINI = {
    "systemInstruction": {"parts": [{"text": "You plan trips."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "How is the weather in Oslo?"}]},
        {
            "role": "model",
            "parts": [
                {"text": "Ask the tool.", "thought": True},
                {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "c2ln"},
            ],
        },
        {
            "role": "user",
            "parts": [{"functionResponse": {"name": "weather", "response": {"degrees": 4, "sky": "blå"}}}],
        },
        {"role": "model", "parts": [{"text": "Cold."}]},
        {"parts": [{"text": "And on this photo?"}, {"inlineData": {"mimeType": "image/png", "data": PNG}}]},
    ],
    "tools": [{"functionDeclarations": [{"name": "weather", "parameters": SCHEMA}]}],
    "generationConfig": {"temperature": 0.2, "thinkingConfig": {"includeThoughts": True}},
    "safetySettings": [],
}
CONVERSE = {
    "modelId": "amazon.nova-pro-v1:0",
    "system": [{"text": "You plan trips."}, {"cachePoint": {"type": "default"}}],
    "messages": [
        {"role": "user", "content": [{"text": "How is the weather in Oslo?"}]},
        {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "Ask the tool."}}},
                {"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Oslo"}}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"toolResult": {"toolUseId": "t1", "content": [{"json": {"degrees": 4, "sky": "blå"}}]}},
            ],
        },
        {"role": "assistant", "content": [{"text": "Cold."}]},
        {
            "role": "user",
            "content": [{"text": "And on this photo?"}, {"image": {"format": "png", "source": {"bytes": PNG}}}],
        },
    ],
    "inferenceConfig": {"maxTokens": 512},
    "toolConfig": {"tools": []},
}
BODIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "chat": (CHAT, {"tool_calls": 1, "image_url": 1}),
    "openrouter": (OPENROUTER, {"tool_calls": 1, "image_url": 1}),
    "litellm": (LITELLM, {"tool_calls": 1, "image_url": 1}),
    "response": (RESPONSE, {"tool_calls": 1, "input_image": 1}),
    "messages": (MESSAGES, {"thinking": 1, "tool_use": 1, "image": 1}),
    "gemini": (GEMINI, {"thought": 1, "functionCall": 1, "inlineData": 1}),
    "converse": (CONVERSE, {"cachePoint": 1, "reasoningContent": 1, "toolUse": 1, "image": 1}),
}
OF_ROUTING = {"model", "messages", "system", "input", "instructions", "contents", "systemInstruction"}


def read(body: dict[str, Any]) -> Question:
    return RouteRequest.model_validate(body).question_of(1024)


@pytest.mark.parametrize("name", BODIES)
def test_a_conversation_is_the_same_in_every_providers_shape(name: str) -> None:
    body, noted = BODIES[name]
    question = read(body)
    assert question.prompt == SAID
    assert question.noted == noted
    assert question.ignored == sorted(body.keys() - OF_ROUTING)


def test_parallel_results_and_the_text_beside_them_keep_their_order() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": "one"},
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "image", "source": {}}]},
        {"type": "tool_result", "tool_use_id": "c"},
    ]
    content = [results[0], {"type": "text", "text": "Go on."}, *results[1:]]
    question = read({"messages": [{"role": "user", "content": content}]})
    assert [(message["role"], message["content"]) for message in question.prompt] == [
        ("tool", "one"),
        ("tool", ""),
        ("tool", ""),
        ("user", "Go on."),
    ]
    assert question.noted == {"image": 1}


def test_each_part_is_compared_with_no_other() -> None:
    """The parts of a body of 1 MiB, compared in pairs, would take seconds of the event loop."""

    class Part(dict[str, Any]):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

    parts = [Part(type="tool_result", content=f"{i}") for i in range(3)] + [Part(type="text", text="Go on.")]
    assert [each["role"] for each in chat_messages([{"role": "user", "content": parts}])] == ["tool"] * 3 + ["user"]


@pytest.mark.parametrize(
    ("item", "text", "noted"),
    [
        ({"type": "custom_tool_call_output", "output": "done"}, "done", {}),
        ({"type": "function_call_output", "output": [{"type": "input_text", "text": "done"}]}, "done", {}),
        ({"type": "function_call_output", "output": {"a": 1}}, '{"a": 1}', {}),
        ({"type": "local_shell_call_output", "output": "done"}, "done", {}),
        ({"type": "shell_call_output", "output": [{"stdout": "a", "stderr": "b", "outcome": {}}]}, "a\nb", {}),
        (
            {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": PNG}},
            "",
            {"computer_screenshot": 1},
        ),
        ({"type": "reasoning", "summary": [], "encrypted_content": "c2Vj"}, "", {"reasoning": 1}),
        ({"type": "item_reference", "id": "msg_1"}, "", {"item_reference": 1}),
        ({"type": "web_search_call", "status": "completed"}, "", {"tool_calls": 1}),
    ],
)
def test_the_items_of_a_response(item: dict[str, Any], text: str, noted: dict[str, int]) -> None:
    question = read({"input": [{"role": "user", "content": "Go on."}, item]})
    assert question.prompt[1] == {"role": "assistant" if not item.get("output") else "tool", "content": text}
    assert question.noted == noted


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        ({"prompt": "one", "system": "Be brief."}, ["system"]),
        ({"input": "one", "system": "Be brief."}, ["system"]),
        ({"contents": [{"parts": [{"text": "one"}]}], "instructions": "Be brief."}, ["instructions"]),
        ({"messages": [{"role": "user", "content": "one"}], "system_instruction": {"parts": [{"text": "a"}]}},
         ["system_instruction"]),
        ({"messages": [{"role": "user", "content": "one"}], "system": None}, []),
        ({"messages": [{"role": "user", "content": "one"}], "system": ""}, []),
    ],
)  # fmt: skip
def test_a_system_prompt_of_another_api_is_named_as_ignored(body: dict[str, Any], ignored: list[str]) -> None:
    question = read(body)
    assert question.ignored == ignored
    assert question.prompt in ("one", [{"role": "user", "content": "one"}])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"contents": []}, "contents"),
        ({"contents": [{"role": "boss", "parts": [{"text": "a"}]}]}, "role"),
        ({"contents": [{"parts": [{"inlineData": {}}]}]}, "white space"),
        ({"contents": [{"parts": [{}]}]}, "white space"),
        ({"contents": [{"parts": [{"text": "a", "thought": True}]}]}, "white space"),
        ({"contents": [{"parts": [{"text": "a"}]}], "prompt": "a"}, "exactly one of"),
        ({"prompt": {"id": "pmpt_1"}}, "exactly one of"),
        ({"messages": [{"role": "user", "content": "a"}], "system": 5}, "system"),
        ({"messages": [{"role": "user", "content": [{"text": 5}]}]}, "text"),
        ({"contents": [{"parts": [{"text": "a"}]}], "system_instructions": {}}, 'did you mean "system_instruction"?'),
        ({"messages": [{"role": "user", "content": "a"}], "explian": True}, 'did you mean "explain"?'),
    ],
)
def test_invalid_bodies_are_refused_in_any_shape(body: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message.replace("?", r"\?")):
        read(body)


def test_the_endpoint_estimates_the_same_for_every_shape(api: Api) -> None:
    answers = [api.post({**body, "explain": True}).raise_for_status().json() for body, _ in BODIES.values()]
    assert len({str(answer["p_correct"]) for answer in answers}) == 1
    assert len({str(answer["expected_cost_usd"]) for answer in answers}) == 1
