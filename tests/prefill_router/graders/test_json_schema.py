from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.common.errors import UserError
from prefill_router.graders import load_grader
from prefill_router.graders.json_schema import find_json

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def score(answer: str, schema: Any = SCHEMA) -> float | None:
    return load_grader("json_schema")(answer, {"schema": schema}).score


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Ann", "age": 3}',
        '```json\n{"name": "Ann"}\n```',
        'First {"nam": 1}, then:\n```\n{"name": "Ann"}\n```\nDone.',
        '~~~\n{"name": "Ann"}',
        'It is {"name": "Ann"}, as you asked {sic}.',
        'Not [1], but {"name": "```"}',
    ],
)
def test_json_is_found_where_it_stands(answer: str) -> None:
    assert score(answer) == 1.0
    assert score(answer, json.dumps(SCHEMA)) == 1.0
    assert load_grader("json_schema", {"schema": SCHEMA})(answer, {}).score == 1.0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no JSON in the answer"),
        ("name: Ann", "no JSON in the answer"),
        ('{"name": "Ann"', "no JSON in the answer"),
        ('{"name": "Ann", "age": -1}', "$.age: -1 is less than the minimum of 0"),
        ('{"name": "Ann", "age": NaN}', "no JSON in the answer"),
        ("[" * 100_000, "no JSON in the answer"),
        ("3", "$: 3 is not of type 'object'"),
    ],
)
def test_what_does_not_meet_the_schema_is_wrong(answer: str, reason: str) -> None:
    assert load_grader("json_schema")(answer, {"schema": SCHEMA})[:2] == (0.0, reason)


@pytest.mark.parametrize(
    "schema", [None, "{", {"type": "strange"}, {"$ref": "http://localhost:9/x.json"}, {"patternProperties": {"(": {}}}]
)
def test_a_schema_that_cannot_be_used_grades_nothing(schema: Any) -> None:
    assert score('{"name": "Ann"}', schema) is None


def test_a_bad_schema_in_the_options_is_an_error_at_once() -> None:
    with pytest.raises(UserError, match="is not a JSON schema: 'strange' is not valid"):
        load_grader("json_schema", {"schema": {"type": "strange"}})


def test_a_pattern_is_broken_off() -> None:
    start = time.monotonic()
    score(json.dumps("a" * 5000 + "b"), {"pattern": r"(a|aa|a?b?a)+$c"})
    assert time.monotonic() - start < 30.0  # without the time limit it takes for ever
    assert score('"abc"', {"pattern": "b"}) == 1.0
    assert score('"abc"', {"pattern": "^b"}) == 0.0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), values), st.booleans())
def test_any_object_is_found_in_a_fence_and_in_a_sentence(value: dict[str, Any], pretty: bool) -> None:
    text = json.dumps(value, indent=2 if pretty else None)
    assert find_json(f"Here:\n```json\n{text}\n```\n") == value
    assert find_json(f"Here it is: {text}. That is all.") == value
