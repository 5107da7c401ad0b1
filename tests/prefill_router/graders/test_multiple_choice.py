from __future__ import annotations

import time
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_router.graders import load_grader

CHOICES = ["Rome", "Paris", "Berlin", "a big dog"]
FORMS = [
    "{}",
    "{}.",
    "({})",
    "**{}**",
    "\\boxed{{{}}}",
    "\\boxed{{\\text{{{}}}}}",
    "The answer is {}",
    "The answer is ({}).",
    "So the correct answer is **{}**.",
    "Answer: {}",
    "**Answer:** {}",
    "The correct choice is: ({})",
    "I choose {}.",
    "Option {} is correct.",
    "It cannot be helped.\n\n**{}**",
    "{}) as said",
    "After a while.\n{}",
    "Final answer: **({})**",
    "The correct option is [{}]",
    "#### {}",
    'answer is "{}"',
    "Answer:\n\n{}",
    "The best answer is option {}.",
    "(A) is wrong, (B) is wrong too. Hence ({}) it is.",
]


def score(answer: str, reference: Any, choices: Any = CHOICES, **options: Any) -> float | None:
    return load_grader("choice", options)(answer, {"reference": reference, "choices": choices}).score


@pytest.mark.parametrize("form", FORMS)
def test_a_letter_is_found_however_it_is_set(form: str) -> None:
    for letter in "ABCD":
        assert score(form.format(letter), "C") == (letter == "C"), letter


@pytest.mark.parametrize(
    "answer",
    [
        "The answer is (A). No, wait: the answer is (C).",
        "I first thought A.\nThe answer is C",
        "\\boxed{A} is what one might say, but \\boxed{C}",
        "The answer is not A. The answer is C.",
        "the answer is c",
        "(c)",
        "Rome lies south, Paris west, so C.",
        "It lies east. Therefore, C",
        "**C. Berlin**",
        "**A guess**: I say (C)",
        "Answer: I think so.\n(C)",
        "c",
        "A) Rome\nB) Paris\nC) Berlin\n\nThe answer is C) Berlin",
        "Berlin",
        "The answer is Berlin.",
        "Because of the wall.\n**Berlin**",
        "C. Berlin",
        "(A) isn't right, and (B) is incorrect. (C) fits.",
    ],
)
def test_the_last_statement_wins_and_a_choice_may_be_written_out(answer: str) -> None:
    assert score(answer, "C") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know.",
        "The answer is A or C",
        "The answer is (A) and (C).",
        "\\boxed{A, C}",
        "Both A, C",
        "The answer is Z",
    ],
)
def test_no_choice_and_two_choices_are_wrong(answer: str) -> None:
    assert score(answer, "C") == 0.0


def test_an_ambiguous_answer_says_so() -> None:
    grade = load_grader("choice")("The answer is A or C", {"reference": "A", "choices": CHOICES})
    assert (grade.score, grade.reason) == (0.0, "ambiguous: A and C")


def test_words_are_no_letters() -> None:
    assert score("A dog barks. I think so.", "A") == 0.0
    assert score("**A thought**", "A") == 0.0
    assert score("The answer is a.", "A") == 1.0
    assert score("The answer is a riddle.", "A") == 0.0
    assert score("The answer is a big dog", "D") == 1.0
    assert score("The answer is A big dog", "A") == 0.0


@pytest.mark.parametrize("reference", ["C", "c", "(C)", 2, "2", 2.0, "Berlin"])
def test_the_reference_is_a_letter_an_index_or_a_text(reference: Any) -> None:
    assert (score("C", reference), score("B", reference)) == (1.0, 0.0)


def test_labels_name_the_choices() -> None:
    arc = {"text": ["x1", "x2", "x3"], "label": ["1", "2", "3"]}
    assert (score("B", "2", arc), score("x2", "2", arc), score("C", "2", arc)) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("reference", [None, float("nan"), "E", 7, "Madrid"])
def test_without_a_usable_reference_the_outcome_is_missing(reference: Any) -> None:
    assert score("C", reference) is None


@given(st.integers(2, 26), st.data())
def test_there_are_as_many_letters_as_choices(num_choices: int, data: st.DataObject) -> None:
    choices = [f"number {i} of all" for i in range(num_choices)]
    index = data.draw(st.integers(0, 25))
    said = f"The answer is ({ascii_uppercase[index]})."
    assert score(said, 0, choices) == float(index == 0)
    if index < num_choices:
        assert score(said, index, choices) == 1.0


@pytest.mark.parametrize("filler", [" ", "\n", "A", "(A) ", "**", "answer is ", "A or ", "\\boxed{", "1 ", "x1,000"])
def test_a_long_answer_takes_no_longer_than_its_length(filler: str) -> None:
    """Two seconds, or on a slow machine no more than in proportion: four times the length, with squares 16 times."""

    def seconds(length: int) -> float:
        answer = f"The answer is {filler * length}!"
        start = time.thread_time()
        for name in ("choice", "numeric", "normalized"):
            assert load_grader(name)(answer, {"reference": 5, "choices": ["u", "v", "w", "x", "y", "z"]}).score == 0.0
        return time.thread_time() - start

    assert seconds(20_000) < max(2.0, 8 * seconds(5_000))
