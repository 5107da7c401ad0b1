"""Whether an answer is right: graders, which make outcomes of the answers of targets.

A grader is a function of an answer and the prompt's row, found by name with `load_grader`. What it cannot grade it
calls missing, never wrong.
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
]  # imported for the names they register
