from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from prefill_router.common.errors import UserError
from prefill_router.graders import load_grader
from prefill_router.graders.harmless import is_harmless

has_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the demo extra is not installed"
)


def tasks(name: str, size: int = 3) -> list[dict[str, Any]]:
    import reasoning_gym

    return list(reasoning_gym.create_dataset(name, size=size, seed=7))


@has_gym
@pytest.mark.parametrize(
    "name", ["chain_sum", "countdown", "simple_integration", "spiral_matrix", "zebra_puzzles", "n_queens"]
)
@pytest.mark.parametrize("stored", [dict, json.dumps])
def test_the_reference_is_right_and_another_answer_is_not(name: str, stored: Any) -> None:
    grade = load_grader("reasoning_gym")
    for task in tasks(name):
        reference = task["answer"] or task["metadata"].get("example_answer") or task["metadata"]["valid_answers"][0]
        row = {"reference": reference, "metadata": stored(task["metadata"])}
        assert grade(reference, row).score == 1.0
        assert grade(f"I think.\n<answer>{reference}</answer>", row).score == 1.0
        assert (grade("certainly not this", row).score or 0.0) < 0.1


@has_gym
def test_an_answer_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w').close()"
    for name in ("countdown", "simple_integration", "puzzle24", "spiral_matrix", "binary_matrix", "string_insertion"):
        [task] = tasks(name, 1)
        grade = load_grader("reasoning_gym")(program, {"reference": "1", "metadata": task["metadata"]})
        assert grade.score == 0.0
        assert "would evaluate" in grade.reason
    assert not mark.exists()


@has_gym
@pytest.mark.parametrize(
    "row",
    [
        {},
        {"reference": "1"},
        {"reference": None, "metadata": {"source_dataset": "chain_sum"}},
        {"reference": "1", "metadata": {}},
        {"reference": "1", "metadata": "{"},
        {"reference": "1", "metadata": {"source_dataset": "no_such_set"}},
        {"reference": "1", "metadata": {"source_dataset": "zebra_puzzles", "num_people": {}}} | {"reference": None},
    ],
)
def test_a_row_without_what_is_needed_is_missing(row: dict[str, Any]) -> None:
    assert load_grader("reasoning_gym")("1", row).score is None


def test_without_the_extra_it_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"reasoning-gym is not installed: pip install 'prefill-router\[demo\]'"):
        load_grader("reasoning_gym")


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4*(5 - 2)",
        "x**3/3 + 2*x**2 - 7*x + C",
        "sin(2*x)/2 + exp(x)*log(x)",
        "(x+1)**(3/2)",
        "exp(-x**2)",
        "-2*x**(-1)",
        "2**x",
    ],
)
def test_formulas_are_harmless(text: str) -> None:
    assert is_harmless(text, "sympy")


@pytest.mark.parametrize(
    "text",
    [
        "exec('x')",
        "open('x')",
        "().__class__",
        "x.subs(1, 2)",
        "[x for x in y]",
        "(lambda: 1)()",
        "'a'*9",
        "9**9**9",
        "9**999999999",
        "9**(9*9*9*9*9*9*9*9*9)",
        "(((9**99)**99)**99)**99",
        "factorial(10**9)",
        "f'{x}'",
        "x if y else z",
        "3!",
        "a\nb",
        "(" * 1000,
        "1+" * 1500 + "1",
        "x := 3",
    ],
)
def test_programs_and_endless_sums_are_not(text: str) -> None:
    start = time.thread_time()
    assert not is_harmless(text, "sympy")
    assert time.thread_time() - start < 5.0  # for ever, if they were computed


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("[['1', 0], [-1, 2.5]]", True),
        ("A", True),
        ("1 2\n3 4", True),
        ("_ Q\nQ _", True),
        ("[open('x')]", False),
        ("exit()", False),
        ("[9**9]", False),
    ],
)
def test_of_python_only_literals_are(text: str, harmless: bool) -> None:
    assert is_harmless(text, "python") == harmless
