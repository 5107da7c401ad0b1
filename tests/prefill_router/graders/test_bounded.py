"""Graders that hang or crash on one answer: its grade is missing, and the next answer is graded."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from prefill_router.common.errors import UserError
from prefill_router.graders import BoundedGrader, Grade, bounded, load_grader

# Each level refers to the next one twice: 2 ** 60 paths to the last.
LEVELS = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
ENDLESS = {"$defs": {**LEVELS, "a60": {}}, "$ref": "#/$defs/a0"}


HOSTILE = """
import os, signal
from prefill_router.common.errors import UserError
from prefill_router.graders import Grade

def grade(answer, row):
    if answer == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "refuse":
        raise UserError("no grader for this")
    return Grade(1.0, str(os.getpid()))
"""


def test_what_takes_too_long_is_not_graded_and_the_next_answer_is() -> None:
    grader = BoundedGrader(load_grader("json_schema"), wall_s=1.0)
    try:
        assert grader("{}", {"schema": ENDLESS}) == Grade(None, "json_schema took more than 1 s")
        assert grader("{}", {"schema": {}}).score == 1.0
        assert grader.unfit({}) == 'the row has no "schema"'
    finally:
        grader.close()


def test_what_ends_its_process_does_not_end_the_one_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    grader = bounded(load_grader("hostile:grade"))
    assert isinstance(grader, BoundedGrader)
    grader.wall_s = 30.0
    copy = pickle.loads(pickle.dumps(grader))
    try:
        alive = grader("", {}).reason
        assert grader("", {}).reason == alive != str(os.getpid())
        assert grader("die", {}) == Grade(None, "hostile:grade ended its process: killed by SIGKILL")
        with pytest.raises(UserError, match="no grader for this"):
            grader("refuse", {})
        assert grader("", {}).score == 1.0
        assert copy("", {}).reason not in (alive, str(os.getpid()))
    finally:
        grader.close()
        copy.close()


def test_graders_that_keep_time_themselves_have_no_other_process() -> None:
    judge = load_grader("judge", {"ask": lambda _: None})
    assert bounded(judge) is judge
    assert all(isinstance(bounded(load_grader(name)), BoundedGrader) for name in ("numeric", "regex", "choice"))


@pytest.mark.parametrize("name", ["pattern", "patternProperties", "additionalProperties"])
def test_every_pattern_of_a_schema_is_broken_off(name: str) -> None:
    pattern, text = r"^(a|aa|a?b?a)+$c", "a" * 3000 + "b"
    schemas: dict[str, tuple[Any, Any]] = {
        "pattern": ({"pattern": pattern}, text),
        "patternProperties": ({"patternProperties": {pattern: False}}, {text: 1}),
        "additionalProperties": (
            {"properties": {}, "patternProperties": {pattern: {}}, "additionalProperties": False},
            {text: 1},
        ),
    }
    schema, value = schemas[name]
    start = time.process_time()
    load_grader("json_schema")(json.dumps(value), {"schema": schema})
    assert time.process_time() - start < 20.0  # without the time limit it takes for ever


def test_equal_items_are_found_in_one_pass() -> None:
    schema = {"uniqueItems": True}
    items: list[Any] = [[i] if i % 2 else {"a": i} for i in range(20_000)]  # of types that cannot be sorted
    start = time.process_time()
    assert load_grader("json_schema")(json.dumps(items), {"schema": schema}).score == 1.0
    assert load_grader("json_schema")(json.dumps([*items, {"a": 4.0}]), {"schema": schema}).score == 0.0
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("value", "schema", "score"),
    [
        ([1, True, "1", [1], None], {"uniqueItems": True}, 1.0),
        ([1, 1.0], {"uniqueItems": True}, 0.0),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], {"uniqueItems": True}, 0.0),
        ([1, 1], {"uniqueItems": False}, 1.0),
        ({"x-a": 1}, {"patternProperties": {"^x-": {"type": "string"}}}, 0.0),
        ({"x-a": "", "b": 1}, {"patternProperties": {"^x-": {"type": "string"}}}, 1.0),
        ({"x-a": "", "b": 1}, {"patternProperties": {"^x-": {}}, "additionalProperties": False}, 0.0),
        ({"x-a": "", "b": 1}, {"patternProperties": {"^x-": {}}, "additionalProperties": {"type": "integer"}}, 1.0),
        ({"a": {"b": 1}}, {"additionalProperties": {"additionalProperties": False}}, 0.0),
        ([], {"additionalProperties": False, "patternProperties": {"a": False}}, 1.0),
        ({}, {"$ref": "#"}, None),
    ],
)  # fmt: skip
def test_keywords_mean_what_the_standard_says(value: Any, schema: Any, score: float | None) -> None:
    assert load_grader("json_schema")(json.dumps(value), {"schema": schema}).score == score


@pytest.mark.parametrize("answer", ["9" * 5000, "1e" + "9" * 5000, "-0." + "0" * 5000 + "1", "[" * 5000 + "]" * 5000])
def test_gigantic_numbers_and_nests_are_graded(answer: str) -> None:
    assert load_grader("numeric")(answer, {"reference": "7"}).score == 0.0
    assert load_grader("choice")(answer, {"reference": "B"}).score == 0.0
    assert load_grader("json_schema")(answer, {"schema": {"type": "string"}}).score == 0.0
