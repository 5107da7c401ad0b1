from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.graders import load_grader


def score(answer: str, reference: Any, **options: Any) -> float | None:
    return load_grader("numeric", options)(answer, {"reference": reference}).score


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("42", 42),
        ("42.", "42"),
        ("The answer is 42.", 42),
        ("It is 6 times 7, so 42", 42),
        ("#### 42\nThat took 3 steps", 42),
        ("The answer is 42 apples, of 50 in 3 boxes.", 42),
        ("The answer is 42 (since x = 3)", 42),
        ("The answer is 40 + 2 = 42", 42),
        ("answer = 42, after 7 tries", 42),
        ("Answer:\n\n**42**", 42),
        ("**Final Answer:** $42$", 42),
        ("1,234,567", 1234567),
        ("$1,234.50", 1234.5),
        ("-$5", -5),
        ("$-5", -5),
        ("−5", -5),
        ("10 - 5 = 5", 5),
        ("10-5", 5),
        ("3/4", 0.75),
        ("1 1/2 cups", 1.5),
        (r"\frac{3}{4}", 0.75),
        (r"\boxed{\dfrac{3}{4}} of 100", 0.75),
        (r"-\frac{1}{2}", -0.5),
        (r"\boxed{x = 5}", 5),
        (r"\boxed{5\text{ cm}}", 5),
        (r"\boxed{90^\circ}", 90),
        (r"\boxed{\$1,000}", 1000),
        ("6.02e23", 6.02e23),
        ("6.02 × 10^23", 6.02e23),
        (r"6.02 \times 10^{23}", 6.02e23),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("50%", 0.5),
        ("50%", 50),
        (r"50\%", "50%"),
        ("0.5", "50%"),
        ("50 percent", "50 %"),
        ("He pays 12 dollars", "3 * 4 = 12\n#### 12"),
        ("12", ["11", "12"]),
        ("0.3333333333", "1/3"),
        ("\\boxed{7}, no: the answer is 8", 8),
    ],
)
def test_a_number_is_found_and_read(answer: str, reference: Any) -> None:
    assert score(answer, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("", 1),
        ("none at all", 1),
        ("42 and then 43", 42),
        ("4 2", 42),
        (r"\boxed{3\sqrt{2}}", 3),
        (r"\boxed{1, 2}", 2),
        ("1/0", 1),
        ("5%", "50%"),
        ("50% or 0.4", "50%"),
        ("5", -5),
        ("x2", 2),
        ("1e999999999", 1),
        ("nan", 1),
        ("10000001", 10000002),
        ("12345678901", "12345678902"),
    ],
)
def test_another_number_or_none_is_wrong(answer: str, reference: Any) -> None:
    assert score(answer, reference) == 0.0


@pytest.mark.parametrize("reference", [None, float("nan"), "many", []])
def test_a_reference_that_is_no_number_is_missing(reference: Any) -> None:
    assert score("42", reference) is None


def test_tolerances() -> None:
    assert score("3.14", 3.14159) == 0.0
    assert score("3.14", 3.14159, absolute=0.002) == 1.0
    assert score("3.14", 3.14159, relative=0.001) == 1.0
    assert score("1e-30", 0, relative=0.5) == 0.0


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_as_python_writes_it_is_itself(number: float) -> None:
    assert score(f"So it is {number}.", number) == 1.0
    if isinstance(number, int):
        assert score(f"The answer is {number:,}", number) == 1.0


@given(st.text())
def test_any_text_gets_a_grade(text: str) -> None:
    assert score(text, 1) in (0.0, 1.0)
    assert load_grader("choice")(text, {"reference": "A"}).score in (0.0, 1.0)
