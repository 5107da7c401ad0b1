from __future__ import annotations

from typing import Any

import pytest

from prefill_router.common.errors import UserError
from prefill_router.graders import Grade, confinement, load_grader
from prefill_router.graders.python_code import python_of

pytestmark = pytest.mark.skipif(bool(confinement.lacking()), reason=f"lacks {confinement.lacking()}")

ANSWER = """The sum is easy:

```python
def add(a, b):
    return a + b
```

Used as:

```
>>> add(1, 2)
3
```
"""
ROW = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}


def grade(answer: str, row: dict[str, Any], **options: Any) -> Grade:
    return load_grader("code", options)(answer, row)


def test_tests_are_run_on_what_the_answer_defines() -> None:
    assert grade(ANSWER, ROW) == Grade(1.0, "passed the tests")
    assert grade(ANSWER.replace("+", "-"), ROW) == Grade(
        0.0, "failed: AssertionError at test line 1: assert add(1, 2) == 3"
    )
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    assert grade(ANSWER, {"tests": check, "entry_point": "add"}).score == 1.0
    assert grade(ANSWER, {"source": check, "name": "add"}, tests="source", entry_point="name").score == 1.0


def test_setup_comes_before_the_answer() -> None:
    answer = "def area(r: Real) -> float:\n    return pi * r * r"
    row = {"tests": "assert area(0) == 0"}
    assert grade(answer, row).score == 0.0
    assert grade(answer, {**row, "setup": "from math import pi\nfrom numbers import Real"}).score == 1.0


@pytest.mark.parametrize("row", [{}, {"tests": None}, {"tests": "assert"}, {"tests": "x = 1"}])
def test_without_tests_that_run_the_outcome_is_missing(row: dict[str, Any]) -> None:
    assert grade(ANSWER, row).score is None


@pytest.mark.parametrize("answer", ["", "I cannot.", "```python\n```", "```python\nwhile True: pass\n```"])
def test_what_does_not_do_it_is_wrong(answer: str) -> None:
    assert grade(answer, ROW, cpu_s=1).score == 0.0


def test_a_machine_that_cannot_confine_is_an_error_before_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "lacking", lambda: {"seccomp": "the kernel has no seccomp filters"})
    with pytest.raises(UserError, match="lacks seccomp"):
        load_grader("code")
    assert load_grader("code", {"unconfined": True})(ANSWER, ROW).score == 1.0


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nthen\n```Python\ny = 2\n```", "x = 1\n\ny = 2\n"),
        ("```\nx = 1\n```\n```json\n{}\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("~~~python\ns = '''\n```\n'''\n~~~", "s = '''\n```\n'''\n"),
        ("```python\nx = 1\n```\n```bash\nls\n```\n```\n1\n```", "x = 1\n"),
        ("- so:\n   ```python\n   x = 1\n   ```", "x = 1\n"),
    ],
)
def test_python_is_taken_out_of_fences(answer: str, code: str) -> None:
    assert python_of(answer) == code
