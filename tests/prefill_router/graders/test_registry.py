from __future__ import annotations

import pickle
from typing import Annotated, Any

import pytest
from pydantic import Field

from prefill_router.common.errors import UserError
from prefill_router.graders import Grade, grader_names, load_grader


def longer(answer: str, row: Any, *, than: Annotated[int, Field(ge=0)], unit: str = "chars") -> Grade:
    """A user's grader with options."""
    return Grade(float(len(answer) > than), unit)


def failing(answer: str, row: Any) -> Grade:
    raise KeyError(row["gone"])


def careless(answer: str, row: Any) -> Any:
    return row["returns"]


def no_row(answer: str) -> Grade:
    return Grade(1.0, "")


NOT_A_FUNCTION = 3


def test_a_user_names_a_function_and_its_options() -> None:
    grade = load_grader(f"{__name__}:longer", {"than": 3})
    assert grade("four", {}) == Grade(1.0, "chars")
    assert grade("one", {}).score == 0.0


def test_a_grader_pickles() -> None:
    for spec, options in [("numeric", {"absolute": 0.1}), ("regex", {"pattern": "a(b)"})]:
        grade = load_grader(spec, options)
        assert pickle.loads(pickle.dumps(grade))("ab 1", {"reference": "b"}) == grade("ab 1", {"reference": "b"})


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("exac", {}, 'unknown grader "exac", did you mean "exact"?'),
        ("zzz", {}, 'unknown grader "zzz", known: choice, '),
        ("no_such_package:f", {}, "No module named 'no_such_package'; expected package.module:function"),
        ("json:nothing", {}, "has no attribute 'nothing'"),
        (":x", {}, "expected package.module:function"),
        (f"{__name__}:NOT_A_FUNCTION", {}, "is a int, must be a function of an answer and a row"),
        (f"{__name__}:no_row", {}, "its first two parameters must be the answer and the row"),
        (f"{__name__}:longer", {}, "than is missing"),
        (f"{__name__}:longer", {"than": -1}, "than = -1, must be greater than or equal to 0"),
        ("numeric", {"absolut": 1}, 'grader numeric: unknown key "absolut", did you mean "absolute"?'),
        ("numeric", {"absolute": "x"}, "grader numeric: absolute = 'x', must be a valid number"),
    ],
)
def test_what_a_user_may_get_wrong_is_said(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_grader(spec, options)
    assert message in str(error.value)


def test_a_grader_that_raises_graded_nothing() -> None:
    grade = load_grader(f"{__name__}:failing")("x", {})
    assert grade.score is None
    assert "raised KeyError: 'gone'" in grade.reason


@pytest.mark.parametrize("returned", [True, 0.5, None, Grade(2.0, ""), Grade(float("nan"), "")])
def test_a_grader_must_return_a_grade(returned: Any) -> None:
    with pytest.raises(UserError, match=r"must be a Grade with a score from 0 to 1"):
        load_grader(f"{__name__}:careless")("x", {"returns": returned})


LACKING = [
    ("exact", {}, {}, 'the row has no "reference"'),
    ("exact", {"reference": "gold"}, {"reference": "x", "gold": None}, 'the row has no "gold"'),
    ("normalized", {}, {"reference": float("nan")}, 'the row has no "reference"'),
    ("regex", {}, {"reference": "(x"}, "reference is not a regular expression: missing )"),
    ("numeric", {}, {"reference": "many"}, "the reference many is not a number"),
    ("choice", {}, {"choices": ["x", "y"]}, 'the row has no "reference"'),
    ("choice", {}, {"reference": "Paris"}, 'the row has no "choices", and its reference Paris is not a letter'),
    ("choice", {}, {"reference": "E", "choices": ["x", "y"]}, "the reference E is not among the 2 choices"),
    ("choice", {}, {"reference": "x", "choices": "x or y"}, "choices: Expecting value"),
    ("code", {}, {"tests": []}, 'the row has no "tests"'),
    ("json_schema", {}, {}, 'the row has no "schema"'),
    ("json_schema", {}, {"schema": '{"type": 3}'}, "schema is not a JSON schema"),
    ("judge", {"ask": print}, {}, 'the row has no "reference"'),
    ("reasoning_gym", {}, {"reference": "1"}, 'the row has no "metadata"'),
    ("reasoning_gym", {}, {"reference": "1", "metadata": "{}"}, "the metadata has no source_dataset"),
]


@pytest.mark.parametrize(("spec", "options", "row", "reason"), LACKING)
def test_a_row_says_before_any_answer_that_none_can_be_graded(
    spec: str, options: dict[str, Any], row: dict[str, Any], reason: str
) -> None:
    if spec == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    grade = load_grader(spec, {"unconfined": True} if spec == "code" else options)
    unfit = grade.unfit(row)
    assert unfit is not None
    assert reason in unfit
    assert grade("an answer", row) == Grade(None, unfit)


def test_a_row_that_lacks_nothing_is_fit() -> None:
    row = {"reference": "1", "choices": ["1", "2"], "tests": "assert f() == 1", "schema": "{}"}
    assert all(load_grader(spec).unfit(row) is None for spec in ("exact", "normalized", "regex", "numeric", "choice"))
    assert load_grader("json_schema", {"schema": {}}).unfit({}) is None
    assert load_grader("code", {"unconfined": True}).unfit(row) is None
    assert load_grader("json_schema").unfit(row) is None
    assert load_grader(f"{__name__}:failing").unfit({}) is None


def test_the_names_are_known() -> None:
    assert {"exact", "normalized", "choice", "numeric", "regex"} <= set(grader_names())
