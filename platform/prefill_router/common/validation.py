"""Files and sockets are read strictly: an unknown key, or a bad value, is one line that says what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from prefill_router.common.errors import UserError


class StrictModel(BaseModel):
    """Base of all that is read from a file or a socket: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _object(value: object) -> object:
    """Flags give JSON as text, files a table."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from None


def _day(value: object) -> object:
    """TOML has dates of its own."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError("must be a date, as 2026-01-31") from None


JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_object)]
IsoDate = Annotated[str, BeforeValidator(_day)]


def validate(model: type[M], data: Mapping[str, Any], source: str) -> M:
    """`data` as a `model`. Raises UserError with one line: the source, the key, the bad value and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(model, error)}") from None


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key is both unknown and missing: the first says more.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}"{nearest(str(problem["loc"][-1]), _keys(model, problem["loc"][:-1]))}'
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = re.sub(r"^(Input|\w+) should ", "must ", problem["msg"].removeprefix("Value error, "))
    return f"{key} = {problem['input']!r}, {message}" if key else message


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where `path` leads, following nested models only."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f', did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}" if known else ""
