"""Redaction of upstreams' error texts that quote keys or accounts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.common.redaction import REDACTED, redacted

KEY = "sk-proj-Ab3dEf6hIj9kLmNoPq"


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: [redacted]"),
        ("Incorrect API key provided: sk-proj-Ab3d*****NoPq. Find", "Incorrect API key provided: [redacted] Find"),
        ("Invalid key Ab3d...NoPq", "Invalid key [redacted]"),
        ("The key that ends in NoPq is not known", "The key that ends in [redacted] is not known"),
        ("x-key=(hIj9kLmN)", "x-key=([redacted])"),
        ("Header Authorization: Bearer abcd", "Header Authorization: Bearer [redacted]"),
        ("Limit of gpt-4o in organization org-AbCdEfGhIj: 3", "Limit of gpt-4o in organization [redacted] 3"),
        ("project proj_4xY was archived", "project [redacted] was archived"),
        ('{"user_id":"user_2abcDEF"}', '{"user_id":"[redacted]"}'),
        ("another's gsk_1a2b, AIzaSyA1234567890abcdefghi", "another's [redacted], [redacted]"),
        ("https://ann:pass@example.com/v1 is no base URL", "https://[redacted]@example.com/v1 is no base URL"),
        ("tenant 0b6f4a0e-1111-4222-8333-444455556666", "tenant [redacted]"),
    ],
)
def test_keys_and_accounts_are_left_out(said: str, left: str) -> None:
    assert redacted(said, KEY) == left


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
        "Invalid schema for response_format 'answer': in context=('properties', 'a'), 'required' is required",
        "messages[0].content: must be a **string**, see https://platform.openai.com/docs/api-reference/chat",
        "gpt-4o-2024-08-06 has no project-wide, user-facing key_value; Asian languages ... are fine",
        "temperature: 2.5 is greater than the maximum of 2",
    ],
)
def test_what_helps_a_caller_stays(said: str) -> None:
    assert redacted(said, KEY) == said


@given(st.text(max_size=30), st.integers(0, 20), st.integers(6, 26), st.text(max_size=30))
def test_no_six_characters_of_the_key_are_ever_left(before: str, start: int, length: int, after: str) -> None:
    left = redacted(f"{before}{KEY[start : start + length]}{after}", KEY).replace(REDACTED, "")
    assert not any(KEY[i : i + 6] in left for i in range(len(KEY) - 5))


def test_a_long_text_is_cut() -> None:
    assert len(redacted("word " * 1_000_000)) == 2000
