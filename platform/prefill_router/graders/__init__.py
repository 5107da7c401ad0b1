"""Whether an answer is right: graders, which make outcomes of the answers of targets.

A grader is a function of an answer and the prompt's row, found by name with `load_grader`. What it cannot grade it
calls missing, never wrong.
"""

from prefill_router.graders import choice, code, json_schema, numeric, text
from prefill_router.graders.grade import Grade
from prefill_router.graders.registry import Grader, grader, grader_names, load_grader

__all__ = [
    "Grade",
    "Grader",
    "choice",
    "code",
    "grader",
    "grader_names",
    "json_schema",
    "load_grader",
    "numeric",
    "text",
]
