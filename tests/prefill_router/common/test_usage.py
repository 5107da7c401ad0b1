"""Usage as upstreams report it: what is billed of it, and what counts as no report."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.common.usage import Usage, read_usage

CHAT = {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}
RESPONSE = {"input_tokens": 10, "output_tokens": 6, "total_tokens": 16}
MESSAGE = {"input_tokens": 10, "output_tokens": 6}
REASONING = {"completion_tokens_details": {"reasoning_tokens": 4}}


@pytest.mark.parametrize(
    ("given", "usage"),
    [
        (CHAT, Usage(10, 6)),
        (RESPONSE, Usage(10, 6)),
        (MESSAGE, Usage(10, 6)),
        ({**CHAT, "input_tokens": 99, "output_tokens": 99}, Usage(10, 6)),
        ({**RESPONSE, "prompt_tokens": None}, Usage(10, 6)),
        ({**CHAT, "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2}}, Usage(10, 6, 3, 2)),
        ({**RESPONSE, "input_tokens_details": {"cached_tokens": 3}}, Usage(10, 6, 3)),
        (
            {
                **RESPONSE,
                "input_tokens_details": {
                    "cache_write_tokens": 5,
                    "cache_write_tokens_details": {"ttl_30m_tokens": 1, "ttl_12h_tokens": 4},
                },
            },
            Usage(10, 6, 0, 5, 4),
        ),
        (
            {**MESSAGE, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "cache_creation": None},
            Usage(15, 6, 3, 2),
        ),
        (
            {
                **MESSAGE,
                "cache_creation_input_tokens": 7,
                "cache_creation": {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 5},
            },
            Usage(17, 6, 0, 7, 5),
        ),
        # As a proxy reports a message in a chat: its prompt tokens include those of the cache.
        ({**CHAT, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2}, Usage(10, 6)),
    ],
)
def test_the_counts_of_each_api_are_those_of_one_usage(given: Any, usage: Usage) -> None:
    assert read_usage(given) == usage


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ({**CHAT, **REASONING}, 6),  # part of the output, as OpenAI reports it
        ({**CHAT, **REASONING, "total_tokens": None}, 6),
        ({**CHAT, **REASONING, "total_tokens": 20}, 10),  # beside it, as xAI reports it
        ({**CHAT, "total_tokens": 20}, 10),  # only the total includes it, as Gemini reports it
        ({**CHAT, "completion_tokens": 3, **REASONING, "total_tokens": None}, 7),  # more than it can be part of
        ({**CHAT, "completion_tokens": 3, **REASONING, "total_tokens": 13}, 7),
        ({**CHAT, "total_tokens": 0}, 6),  # less than its parts
        ({**CHAT, "prompt_tokens": 12, "total_tokens": 11}, 6),
        ({"prompt_tokens": 10_120, "completion_tokens": 1_499, "total_tokens": 14_428}, 4_308),
        (
            {
                "prompt_tokens": 10_120,
                "completion_tokens": 1_499,
                "completion_tokens_details": {"reasoning_tokens": 2_809},
                "total_tokens": 14_428,
            },
            4_308,
        ),
        ({**RESPONSE, "output_tokens_details": {"reasoning_tokens": 6}}, 6),
        ({**MESSAGE, "cache_read_input_tokens": 5, "total_tokens": 21}, 6),  # a total of the whole input
        ({**MESSAGE, "cache_read_input_tokens": 5, "total_tokens": 16}, 6),
    ],
)
def test_reasoning_is_billed_once(given: Any, output: int) -> None:
    usage = read_usage(given)
    assert usage is not None
    assert usage.output_tokens == output


@pytest.mark.parametrize("count", [-1, 10**8 + 1, 10**30, True, 5.0, float("nan"), "5", [5]])
@pytest.mark.parametrize(
    "place",
    [
        ("prompt_tokens",),
        ("completion_tokens",),
        ("total_tokens",),
        ("completion_tokens_details", "reasoning_tokens"),
        ("prompt_tokens_details", "cached_tokens"),
        ("prompt_tokens_details", "cache_write_tokens"),
    ],
)
def test_a_count_that_is_none_makes_no_report(count: Any, place: tuple[str, ...]) -> None:
    usage: dict[str, Any] = {**CHAT}
    inner = usage
    for name in place[:-1]:
        inner = inner.setdefault(name, {})
    inner[place[-1]] = count
    assert read_usage(usage) is None


@pytest.mark.parametrize(
    "given",
    [
        None,
        {},
        {"prompt_tokens": 10},
        {"output_tokens": 6},
        {**CHAT, "prompt_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 5}},
        {**MESSAGE, "cache_creation": {"ephemeral_1h_input_tokens": 5}},
        {**MESSAGE, "cache_creation_input_tokens": 4, "cache_creation": {"ephemeral_1h_input_tokens": 5}},
    ],
)
def test_a_usage_whose_parts_contradict_it_is_no_report(given: Any) -> None:
    assert read_usage(given) is None


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner), max_leaves=3))
def test_no_value_is_too_strange(value: Any) -> None:
    for name in (*CHAT, "prompt_tokens_details", "completion_tokens_details"):
        usage = read_usage({**CHAT, name: value})
        assert usage is None or all(0 <= count <= 3 * 10**8 for count in usage)
