"""The `reasoning_gym` grader: scores an answer with its data set's own verifier, which may give partial credit.

Some verifiers evaluate the answer as Python, or with sympy, which can run any Python too. These verifiers get harmless
answers only; see `harmless.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from prefill_router.common.errors import UserError
from prefill_router.graders.grade import Grade, Row, lacking, missing, nested, references, short, wrong
from prefill_router.graders.harmless import is_harmless
from prefill_router.graders.registry import grader

Verifier = Callable[[str, dict[str, Any]], float]

_TAG, _END_TAG = "<answer>", "</answer>"
_EVALUATES = {"sympy": re.compile(r"\bparse_expr\(answer"), "python": re.compile(r"\beval\(answer")}


def _check(_: Mapping[str, Any]) -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("grader reasoning_gym: reasoning-gym is not installed: pip install 'prefill-router[demo]'")


def _unfit(row: Row, options: Mapping[str, Any]) -> str | None:
    if reason := lacking(row, options["reference"], options["metadata"]):
        return reason
    try:
        _verifier(_dataset(nested(row[options["metadata"]]), options["dataset"]))
    except ValueError as error:
        return short(error)
    return None


@grader("reasoning_gym", check=_check, unfit=_unfit)
def reasoning_gym(
    answer: str, row: Row, *, reference: str = "reference", metadata: str = "metadata", dataset: str | None = None
) -> Grade:
    """Scores with the verifier of `dataset`, or of `source_dataset` in the row's metadata.

    Verifies the content of the answer's last <answer> tag, or the whole answer. An answer that the verifier cannot read
    is wrong, unless the verifier cannot read the reference either: then the grade is missing.
    """
    facts = nested(row[metadata])
    name = _dataset(facts, dataset)
    verifier, language = _verifier(name)
    said = (tagged(answer) or answer).strip()
    if language is not None and not is_harmless(said, language):
        return wrong(f"{name} would evaluate {short(said)}")
    return _verified(verifier, said, {**row, "answer": str(references(row, reference)[0]), "metadata": facts}, name)


def tagged(answer: str) -> str | None:
    """The content of the answer's last closed <answer> tag, or None."""
    found, at = None, 0
    while (start := answer.find(_TAG, at)) >= 0 and (end := answer.find(_END_TAG, start + len(_TAG))) >= 0:
        found, at = answer[start + len(_TAG) : end], end + len(_END_TAG)
    return found


def _verified(verifier: Verifier, said: str, entry: dict[str, Any], name: str) -> Grade:
    try:
        score = float(verifier(said, entry))
    except Exception as error:  # the fault is the answer's, unless the reference fails too
        try:
            verifier(entry["answer"], entry)
        except Exception:
            return missing(f"{name} cannot verify its own answer: {type(error).__name__}: {short(error)}")
        return wrong(f"{name} cannot read the answer: {type(error).__name__}: {short(error)}")
    return Grade(min(max(score, 0.0), 1.0), f"{name}: {score:g}")


def _dataset(facts: Mapping[str, Any], dataset: str | None) -> str:
    """The name of the data set. Raises ValueError if neither argument has one."""
    name = dataset or facts.get("source_dataset")
    if not isinstance(name, str):
        raise ValueError("the metadata has no source_dataset")
    return name


@functools.cache
def _verifier(name: str) -> tuple[Verifier, str | None]:
    """A data set's verifier, and the language it evaluates answers in, if any. Raises ValueError for unknown names."""
    from reasoning_gym import get_score_answer_fn

    verifier = get_score_answer_fn(name)
    source = inspect.getsource(verifier)
    return verifier, next((language for language, pattern in _EVALUATES.items() if pattern.search(source)), None)
