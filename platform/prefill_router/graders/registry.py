"""The registry of graders: built-in ones by name, a user's own as `package.module:function`.

A grader is a function of an answer and its row. Its further parameters are options, whose types validate a recipe's
options before any answer is graded. A grader also declares which rows are unfit, so that nobody pays for answers that
cannot be graded.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, create_model

from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel, validate
from prefill_router.graders.grade import Grade, Row, missing, short

F = TypeVar("F", bound=Callable[..., Grade])
Check = Callable[[Mapping[str, Any]], object]
Unfit = Callable[[Row, Mapping[str, Any]], str | None]

_GRADERS: dict[str, Callable[..., Grade]] = {}
_CHECKS: dict[str, Check] = {}
_UNFIT: dict[Callable[..., Grade], Unfit] = {}
_KEEPING_TIME: set[Callable[..., Grade]] = set()


def grader(
    name: str, check: Check | None = None, unfit: Unfit | None = None, *, keeps_time: bool = False
) -> Callable[[F], F]:
    """Registers a function by name.

    `check` gets the options on loading, and raises UserError for a missing requirement. `unfit` gets a row and the
    options, and returns the reason why no answer to the row can be graded, or None; the function is called for fit rows
    only. A function that `keeps_time` limits its own run time.
    """

    def register(function: F) -> F:
        assert name not in _GRADERS, f"two graders are named {name}"
        _GRADERS[name] = function
        if check is not None:
            _CHECKS[name] = check
        if unfit is not None:
            _UNFIT[function] = unfit
        if keeps_time:
            _KEEPING_TIME.add(function)
        return function

    return register


@dataclass(frozen=True)
class Grader:
    """A grader function with its options. Picklable if both are."""

    spec: str
    function: Callable[..., Grade]
    options: Mapping[str, Any]

    def __call__(self, answer: str, row: Row) -> Grade:
        """Grades one answer. The grade is missing if the row is unfit or the function raises.

        Raises UserError if the function does, or if it returns no Grade or a score outside [0, 1].
        """
        if (reason := self.unfit(row)) is not None:
            return missing(reason)
        try:
            grade = self.function(answer, row, **self.options)
        except UserError:
            raise
        except Exception as error:  # a user's function or a verifier may raise anything
            return missing(f"{self.spec} raised {type(error).__name__}: {short(error)}")
        if not isinstance(grade, Grade) or not (grade.score is None or 0.0 <= grade.score <= 1.0):
            raise UserError(f"grader {self.spec} returned {short(grade)}, must be a Grade with a score from 0 to 1")
        return grade

    @property
    def keeps_time(self) -> bool:
        """Whether the function limits its own run time."""
        return self.function in _KEEPING_TIME

    def unfit(self, row: Row) -> str | None:
        """The reason why no answer to a row can be graded, or None, also if the grader declares no check."""
        needs = _UNFIT.get(self.function)
        try:
            return None if needs is None else needs(row, self.options)
        except Exception as error:  # a row may hold anything
            return f"{self.spec} cannot read the row: {type(error).__name__}: {short(error)}"


def grader_names() -> list[str]:
    return sorted(_GRADERS)


def load_grader(spec: str, options: Mapping[str, Any] | None = None) -> Grader:
    """Loads the grader `spec`. Raises UserError for an unknown name, a failed import or invalid options."""
    function = _imported(spec) if ":" in spec else _registered(spec)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Field name .* shadows an attribute", UserWarning)
        model = create_model(spec, __base__=_Options, **_fields(spec, function))
    values = validate(model, options or {}, f"grader {spec}")
    checked = {name: getattr(values, name) for name in model.model_fields}
    if spec in _CHECKS:
        _CHECKS[spec](checked)
    return Grader(spec, function, checked)


class _Options(StrictModel):
    # A judge is a callable. Options may have names of pydantic's own attributes, such as `schema`.
    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())


def _registered(name: str) -> Callable[..., Grade]:
    if name in _GRADERS:
        return _GRADERS[name]
    close = difflib.get_close_matches(name, _GRADERS, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(grader_names())}, or package.module:function"
    raise UserError(f'unknown grader "{name}", {hint}')


def _imported(spec: str) -> Callable[..., Grade]:
    module_name, _, attribute = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f'grader "{spec}": {error}; expected package.module:function') from None
    if not callable(function):
        raise UserError(f'grader "{spec}" is a {type(function).__name__}, must be a function of an answer and a row')
    return function  # type: ignore[no-any-return]


def _fields(spec: str, function: Callable[..., Grade]) -> dict[str, Any]:
    """A function's options as fields of a pydantic model: its parameters after the answer and the row."""
    parameters = list(inspect.signature(function).parameters.values())
    if len([p for p in parameters[:2] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) < 2:
        raise UserError(f'grader "{spec}": its first two parameters must be the answer and the row')
    hints = get_type_hints(function, include_extras=True)
    options = [p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in options}
