"""Usage: the tokens that an answer is billed for, as reported by any of the APIs that targets are asked through.

Sources: the API references of OpenAI (chat completions, responses) and Anthropic (Messages, prompt caching).
"""

from __future__ import annotations

from typing import Any, NamedTuple

_MOST_TOKENS = 10**8  # a larger count is invalid


class Usage(NamedTuple):
    """Billed tokens. Those read from and written to a cache are part of the input, reasoning is part of the output."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_long_tokens: int = 0  # of those written, those kept longer than usual: 1 h (Anthropic), 12 h (OpenAI)


def read_usage(given: object) -> Usage | None:
    """Reads the `usage` of a chat completion, a response or a message.

    A message's `input_tokens` exclude the tokens of the cache, which are added. Reasoning is part of the output, unless
    the total less the input is more than the output, or reasoning alone is: then the output excludes it.

    None stands for a usage that was not reported: input or output is missing, a count is no integer from 0 to 10^8, or
    the parts of the input exceed it.
    """
    usage = _object(given)
    sides = ("input", "output") if usage.get("prompt_tokens") is None else ("prompt", "completion")
    of_input, of_output = (_object(usage.get(f"{side}_tokens_details")) for side in sides)
    message = usage if sides[0] == "input" else {}
    optional = [
        usage.get("total_tokens"),
        of_output.get("reasoning_tokens"),
        of_input.get("cached_tokens"),
        of_input.get("cache_write_tokens"),
        _object(of_input.get("cache_write_tokens_details")).get("ttl_12h_tokens"),
        message.get("cache_read_input_tokens"),
        message.get("cache_creation_input_tokens"),
        _object(message.get("cache_creation")).get("ephemeral_1h_input_tokens"),
    ]
    counts: list[Any] = [usage.get(f"{side}_tokens") for side in sides]
    counts += [0 if count is None else count for count in optional]
    if not all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts):
        return None
    stated, output, total, reasoning, cached, written, written_12h, read, created, created_1h = counts
    whole_input = stated + read + created
    output = max(output, total - whole_input)
    output += reasoning if reasoning > output else 0
    billed = Usage(whole_input, output, cached + read, written + created, written_12h + created_1h)
    of_cache = billed.cached_tokens + billed.cache_write_tokens
    is_possible = of_cache <= whole_input and billed.cache_write_long_tokens <= billed.cache_write_tokens
    return billed if is_possible else None


def _object(given: object) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}
