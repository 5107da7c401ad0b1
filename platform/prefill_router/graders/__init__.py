"""Graders: functions that score a target's answer from 0 to 1, given the prompt's row.

`load_grader` finds one by name. Start reading at `registry`, then `grade`: an answer that cannot be graded gets a
missing grade, never a wrong one.
"""

from prefill_router.corpus.reader import Message
from prefill_router.graders import gym, json_schema, judge, multiple_choice, numeric, python_code, text_match
from prefill_router.graders.bounded import BoundedGrader, bounded
from prefill_router.graders.grade import Grade
from prefill_router.graders.judge import Ask, Reply
from prefill_router.graders.registry import Grader, grader, grader_names, load_grader

__all__ = ["Ask", "BoundedGrader", "Grade", "Grader", "Message", "Reply", "bounded"]
__all__ += ["grader", "grader_names", "load_grader"]
__all__ += [
    "gym",
    "json_schema",
    "judge",
    "multiple_choice",
    "numeric",
    "python_code",
    "text_match",
]  # imported because they register their graders
