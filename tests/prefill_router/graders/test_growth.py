"""Adversarial answers: the run time of a grader grows no faster than the length of the answer."""

from __future__ import annotations

import json
import time

import pytest

from prefill_router.graders import load_grader
from prefill_router.graders.boxes import last_box
from prefill_router.graders.fences import fences
from prefill_router.graders.gym import tagged
from prefill_router.graders.json_schema import find_json

LENGTH = 40_000  # characters; quadratic time would be seconds to hours
MOST_CPU_S = 2.0

ANSWERS = {
    "blanks of a fence": "```" + " " * LENGTH + "`",
    "language of a fence": "```" + "a" * LENGTH + "`",
    "tildes": "~" * LENGTH + "`",
    "end of a fence": "```\n" + "```  " * (LENGTH // 5),
    "fences": "```\n" * (LENGTH // 4),
    "dots behind a letter": "A" + "." * LENGTH + "\nx",
    "letters set apart": "(A)," * (LENGTH // 4),
    "letters of one statement": "The answer is " + "A, " * (LENGTH // 3),
    "statements": "The answer is A. " * (LENGTH // 17),
    "sums": "The answer is " + "1 + " * (LENGTH // 4) + "=",
    "equations": "The answer is " + "1=" * (LENGTH // 2),
    "commas": "1," * (LENGTH // 2),
    "thousands": "1" + ",000" * (LENGTH // 4) + ",",
    "brackets": "\\boxed{" * (LENGTH // 7),
    "lists": "[" * LENGTH,
    "lists of numbers": "[1,2,[" * 900 + "1," * (LENGTH // 2),
    "objects": '{"a":' * (LENGTH // 5),
    "tags": "<answer>" * (LENGTH // 8),
    "signs": "-" * LENGTH + "1",
    "punctuation": "1(" * (LENGTH // 2),
    "articles": "a " * (LENGTH // 2),
    "blanks": " " * LENGTH,
    "lines": "\n" * LENGTH,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_takes_longer_than_its_length_allows(name: str) -> None:
    answer, start = ANSWERS[name], time.thread_time()
    for reader in (fences, find_json, last_box, tagged):
        reader(answer)
    load_grader("choice")(answer, {"reference": "B", "choices": ["one", "two"]})
    load_grader("numeric")(answer, {"reference": "7"})
    load_grader("exact")(answer, {"reference": "7"})
    load_grader("normalized", {"anywhere": True})(answer, {"reference": "the end"})
    assert time.thread_time() - start < MOST_CPU_S


def test_what_is_found_is_the_same() -> None:
    assert [f.text for f in fences("~~~py x\na\n```\n~~~ \nb\n````\n```\nc\n`````\n```\r\nd\r\n```\r\n")] == [
        "a\n```\n",
        "```\nc\n",
        "d\r\n",
    ]
    assert tagged("<answer>1</answer> or <answer> 2 <answer>3</answer> not <answer>4") == " 2 <answer>3"
    assert tagged("</answer> none <answer>") is None
    assert find_json("[1, 2 and [3] and {" + json.dumps({"a": [1]})) == {"a": [1]}
    choice = load_grader("choice")
    answers = ("A... because\n ). ", "A .: x", "A.\nx", "A **).")
    assert [choice(answer, {"reference": "A"}).score for answer in answers] == [1.0, 1.0, 1.0, 0.0]
    numeric = load_grader("numeric")
    assert numeric("The answer is 1 + 2 = 3 = 3.0, 4 apples", {"reference": "3"}).score == 1.0
    assert numeric("The answer is 7 - 2 = ", {"reference": "2"}).score == 1.0
