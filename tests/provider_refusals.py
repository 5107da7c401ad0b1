"""Refusals in the words of providers, and what each is about."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Json = dict[str, Any]


class ProviderRefusal(NamedTuple):
    """An error response. `about` is its kind, and the field that it names with the field's new name."""

    provider: str
    status: int
    body: Any
    about: tuple[str | None, ...]


def _openai(message: str, param: str | None = None, code: str | None = None, **more: Any) -> Json:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code, **more}}


def _vllm(message: str) -> Json:
    return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}


def _anthropic(message: str) -> Json:
    return {"type": "error", "error": {"type": "invalid_request_error", "message": message}, "request_id": "req_011"}


def _google(message: str) -> Any:
    return [{"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}]


def _openrouter(message: str, code: int = 400, **metadata: Any) -> Json:
    return {"error": {"message": message, "code": code, **({"metadata": metadata} if metadata else {})}}


def _forbidden(*names: str) -> list[Json]:
    return [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": 1}
        for name in names
    ]


TOO_LONG, CONTENT, REQUEST, OPERATOR = ("too_long",), ("content",), ("request",), (None,)
TOOLS, IMAGES = ("content", "tools"), ("content", "images")
WRAPPED = json.dumps(_openai("Unsupported parameter: 'seed' is not supported with this model.", "seed"))

REFUSALS = [
    ProviderRefusal(*given)
    for given in (
        # --- the prompt or the answer is too long ---
        (
            "OpenAI",
            400,
            _openai(
                "This model's maximum context length is 128000 tokens. However, your messages resulted in 130021 "
                "tokens. Please reduce the length of the messages.",
                "messages",
                "context_length_exceeded",
            ),
            TOO_LONG,
        ),
        (
            "OpenAI",
            400,
            _openai(
                "Your input exceeds the context window of this model. Please adjust your input and try again.",
                "input",
                "context_length_exceeded",
            ),
            TOO_LONG,
        ),
        (
            "OpenAI",
            400,
            _openai(
                "max_tokens is too large: 100000. This model supports at most 16384 completion tokens, whereas you "
                "provided 100000.",
                "max_tokens",
                "invalid_value",
            ),
            TOO_LONG,
        ),
        (
            "Azure",
            400,
            _openai(
                "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300010 tokens. "
                "Please reduce the length of the messages.",
                "messages",
                "context_length_exceeded",
            ),
            TOO_LONG,
        ),
        ("Anthropic", 400, _anthropic("prompt is too long: 215021 tokens > 200000 maximum"), TOO_LONG),
        (
            "Anthropic",
            400,
            _anthropic(
                "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length or "
                "`max_tokens` and try again"
            ),
            TOO_LONG,
        ),
        (
            "Anthropic",
            400,
            _anthropic(
                "max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for claude-sonnet-4"
            ),
            TOO_LONG,
        ),
        (
            "Anthropic",
            413,
            {"type": "error", "error": {"type": "request_too_large", "message": "Request exceeds the maximum size"}},
            TOO_LONG,
        ),
        (
            "Google",
            400,
            _google("The input token count (1200021) exceeds the maximum number of tokens allowed (1048576)."),
            TOO_LONG,
        ),
        (
            "Mistral",
            400,
            {
                "object": "error",
                "message": "Prompt contains 40021 tokens and 0 draft tokens, too large for model with 32768 "
                "maximum context length",
                "type": "invalid_request_prompt",
                "param": None,
                "code": "3051",
            },
            TOO_LONG,
        ),
        (
            "Groq",
            400,
            _openai("Please reduce the length of the messages or completion.", "messages", "context_length_exceeded"),
            TOO_LONG,
        ),
        (
            "Groq",
            413,
            {
                "error": {
                    "message": "Request too large for model `llama-3.3-70b-versatile` on tokens per minute (TPM): "
                    "Limit 12000, Requested 40021, please reduce your message size and try again.",
                    "type": "tokens",
                    "code": "rate_limit_exceeded",
                }
            },
            TOO_LONG,
        ),
        (
            "Groq",
            400,
            _openai(
                "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than "
                "the `context_window` for this model",
                "max_tokens",
            ),
            TOO_LONG,
        ),
        (
            "Together",
            422,
            _openai(
                "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193. Given: 9021 `inputs` "
                "tokens and 512 `max_new_tokens`"
            ),
            TOO_LONG,
        ),
        (
            "OpenRouter",
            400,
            _openrouter(
                "This endpoint's maximum context length is 131072 tokens. However, you requested about 140021 tokens "
                "(139000 of text input, 1021 in the output). Please reduce the length of either one."
            ),
            TOO_LONG,
        ),
        (
            "vLLM",
            400,
            _vllm(
                "This model's maximum context length is 4096 tokens. However, you requested 5021 tokens (4021 in the "
                "messages, 1000 in the completion). Please reduce the length of the messages or completion."
            ),
            TOO_LONG,
        ),
        (
            "vLLM",
            400,
            {
                "error": _vllm(
                    "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length "
                    "is 4096 tokens and your request has 21 input tokens (5000 > 4096 - 21)."
                )
            },
            TOO_LONG,
        ),
        (
            "llama.cpp",
            400,
            {
                "error": {
                    "code": 400,
                    "message": "the request exceeds the available context size. try increasing the context size",
                    "type": "exceed_context_size_error",
                    "n_prompt_tokens": 5021,
                    "n_ctx": 4096,
                }
            },
            TOO_LONG,
        ),
        (
            "xAI",
            400,
            {
                "code": "Client specified an invalid argument",
                "error": "This model's maximum prompt length is 131072 but the request contains 140021 tokens.",
            },
            TOO_LONG,
        ),
        # --- a field, or a value of it, that the model does not take ---
        (
            "OpenAI",
            400,
            _openai(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
                "instead.",
                "max_tokens",
                "unsupported_parameter",
            ),
            ("parameter", "max_tokens", "max_completion_tokens"),
        ),
        (
            "OpenAI",
            400,
            _openai(
                "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is "
                "supported.",
                "temperature",
                "unsupported_value",
            ),
            ("parameter", "temperature"),
        ),
        (
            "OpenAI",
            400,
            _openai(
                "Unsupported value: 'reasoning_effort' does not support 'minimal' with this model. Supported values "
                "are: 'low', 'medium', and 'high'.",
                "reasoning_effort",
                "unsupported_value",
            ),
            ("parameter", "reasoning_effort"),
        ),
        (
            "OpenAI",
            400,
            _openai("Unknown parameter: 'top_k'.", "top_k", "unknown_parameter"),
            ("parameter", "top_k"),
        ),
        (
            "OpenAI",
            400,
            _openai(
                "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
                "response_format",
            ),
            ("parameter", "response_format"),
        ),
        (
            "Azure",
            400,
            _openai("Unrecognized request argument supplied: stream_options"),
            ("parameter", "stream_options"),
        ),
        (
            "Azure",
            400,
            _openai(
                "Unsupported parameter: 'parallel_tool_calls' is not supported with this model.",
                "parallel_tool_calls",
                "unsupported_parameter",
            ),
            ("parameter", "parallel_tool_calls"),
        ),
        (
            "Anthropic",
            400,
            _anthropic("frequency_penalty: Extra inputs are not permitted"),
            ("parameter", "frequency_penalty"),
        ),
        (
            "Anthropic",
            400,
            _anthropic("`temperature` may only be set to 1 when thinking is enabled. Please consult our documentation"),
            ("parameter", "temperature"),
        ),
        (
            "Google",
            400,
            _google('Invalid JSON payload received. Unknown name "logit_bias": Cannot find field.'),
            ("parameter", "logit_bias"),
        ),
        ("Mistral", 422, {"detail": _forbidden("stream_options")}, ("parameter", "stream_options")),
        (
            "Mistral",
            422,
            {
                "object": "error",
                "message": {"detail": _forbidden("seed")},
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            },
            ("parameter", "seed"),
        ),
        ("Groq", 400, _openai("property 'logprobs' is unsupported"), ("parameter", "logprobs")),
        (
            "Groq",
            400,
            _openai("`reasoning_effort` is not supported with this model", "reasoning_effort"),
            ("parameter", "reasoning_effort"),
        ),
        (
            "OpenRouter",
            400,
            _openrouter("Provider returned error", raw=WRAPPED, provider_name="OpenAI"),
            ("parameter", "seed"),
        ),
        (
            "vLLM",
            400,
            _vllm(
                "[{'type': 'extra_forbidden', 'loc': ('body', 'verbosity'), 'msg': 'Extra inputs are not permitted', "
                "'input': 'low'}]"
            ),
            ("parameter", "verbosity"),
        ),
        (
            "xAI",
            400,
            {
                "code": "Client specified an invalid argument",
                "error": "Model grok-4 does not support parameter presencePenalty.",
            },
            ("parameter", "presence_penalty"),
        ),
        (
            "xAI",
            400,
            {"code": "Client specified an invalid argument", "error": "Argument not supported on this model: stop"},
            ("parameter", "stop"),
        ),
        (
            "Bedrock",
            400,
            {
                "message": "Malformed input request: #: extraneous key [user] is not permitted, please reformat your "
                "input and try again."
            },
            ("parameter", "user"),
        ),
        (
            "Fireworks",
            400,
            {
                "error": {
                    "object": "error",
                    "type": "invalid_request_error",
                    "message": "Extra inputs are not permitted, field: 'store', value: True",
                }
            },
            ("parameter", "store"),
        ),
        # --- a tool, an image or a text that the model does not take ---
        (
            "OpenAI",
            400,
            _openai(
                "Invalid value: 'web_search_preview'. Supported values are: 'function' and 'custom'.",
                "tools[0].type",
                "invalid_value",
            ),
            REQUEST,
        ),
        (
            "Azure",
            400,
            _openai(
                "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
                "prompt",
                "content_filter",
                status=400,
            ),
            CONTENT,
        ),
        ("Google", 400, _google("Function calling is not enabled for models/gemma-3-27b-it"), TOOLS),
        ("Google", 400, _google("Image input modality is not enabled for models/gemma-3-1b-it"), IMAGES),
        ("Groq", 400, _openai("`tool calling` is not supported with this model"), TOOLS),
        ("Ollama", 400, _openai("registry.ollama.ai/library/gemma:2b does not support tools"), TOOLS),
        (
            "DeepSeek",
            400,
            _openai(
                "Failed to deserialize the JSON body into the target type: messages[0]: unknown variant `image_url`, "
                "expected `text` at line 1 column 73"
            ),
            IMAGES,
        ),
        (
            "vLLM",
            400,
            _vllm('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
            TOOLS,
        ),
        (
            "vLLM",
            400,
            _vllm("At most 0 image(s) may be provided in one prompt."),
            IMAGES,
        ),
        (
            "OpenRouter",
            404,
            _openrouter("No endpoints found that support tool use. To learn more, visit the documentation.", 404),
            TOOLS,
        ),
        ("OpenRouter", 404, _openrouter("No endpoints found that support image input", 404), IMAGES),
        (
            "OpenRouter",
            403,
            _openrouter("Your input was flagged by the provider.", 403, reasons=["violence"]),
            CONTENT,
        ),
        # --- anything else about the request ---
        (
            "OpenAI",
            400,
            _openai(
                "Invalid schema for function 'f': In context=(), 'additionalProperties' is required to be supplied and "
                "to be false.",
                "tools[0].function.parameters",
                "invalid_function_parameters",
            ),
            REQUEST,
        ),
        (
            "OpenAI",
            400,
            _openai(
                "The encrypted content for item rs_1 could not be verified.",
                None,
                "invalid_encrypted_content",
            ),
            REQUEST,
        ),
        (
            "Anthropic",
            400,
            _anthropic("`temperature` and `top_p` cannot both be specified for this model. Please use only one."),
            REQUEST,
        ),
        (
            "Mistral",
            400,
            {
                "object": "error",
                "message": "Expected last role User or Tool (or Assistant with prefix True) but got assistant",
                "type": "invalid_request_message_order",
                "code": "3230",
            },
            REQUEST,
        ),
        (
            "Groq",
            400,
            _openai(
                "'messages.0' : for 'role:user' the following must be satisfied[('messages.0.content' : value must be "
                "a string)]"
            ),
            REQUEST,
        ),
        ("nginx", 405, "<html>Method Not Allowed</html>", REQUEST),
    )
]

# Errors of the pool's key, quota or model name, which some providers report with the status of a refused request.
OF_THE_OPERATOR = [
    ProviderRefusal(provider, status, body, OPERATOR)
    for provider, status, body in (
        ("Google", 400, _google("API key not valid. Please pass a valid API key.")),
        ("Anthropic", 400, _anthropic("Your credit balance is too low to access the Anthropic API.")),
        (
            "Groq",
            400,
            _openai("Organization has been restricted. Please reach out to support.", None, "organization_restricted"),
        ),
        ("Groq", 400, _openai("The model `x` has been decommissioned.", None, "model_decommissioned")),
        ("Mistral", 400, {"object": "error", "message": "Invalid model: x", "type": "invalid_model", "code": "1500"}),
        ("OpenRouter", 400, _openrouter("x is not a valid model ID")),
        ("DeepSeek", 400, _openai("Model Not Exist")),
        ("OpenAI", 401, _openai("Incorrect API key provided", None, "invalid_api_key")),
        (
            "OpenAI",
            404,
            _openai("The model `x` does not exist or you do not have access to it.", None, "model_not_found"),
        ),
        ("OpenAI", 429, _openai("You exceeded your current quota", None, "insufficient_quota")),
        ("OpenRouter", 402, _openrouter("Insufficient credits", 402)),
        ("OpenRouter", 403, _openrouter("Your organization does not support this model", 403)),
    )
]
