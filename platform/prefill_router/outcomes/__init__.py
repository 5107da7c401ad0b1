"""Outcomes: graded answers, that is, whether a target was correct on a prompt, its answer's length and its cost.

`outcome_tables` reads files, and `outcome_matrix` makes matrices of them.
"""

from prefill_router.outcomes.outcome_matrix import Answers, Outcomes, at_threshold, load_outcomes
from prefill_router.outcomes.outcome_tables import check_columns, is_feedback, load_feedback, tables, target_names

__all__ = ["Answers", "Outcomes", "at_threshold", "check_columns", "is_feedback", "load_feedback", "load_outcomes"]
__all__ += ["tables", "target_names"]
