"""Strict validation of files and requests: an unknown key or a bad value gives a one-line error with the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from prefill_router.common.errors import UserError
from prefill_router.common.redaction import redacted


class StrictModel(BaseModel):
    """Base class of models read from files or requests. Rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SparseModel(StrictModel):
    """Serialises only fields that were set, so that a new field does not change the version of older artifacts."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}


M = TypeVar("M", bound=BaseModel)

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _parse_object(value: object) -> object:
    """Parses JSON text, which flags give. Tables from files pass unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from None


def _parse_date(value: object) -> object:
    """Normalises an ISO date. TOML gives dates as `date` objects, flags as text."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError("must be a date, such as 2026-01-31") from None


def _whole_if_many(gpus: float) -> float:
    """Checks what Ray assigns: a fraction of one GPU, or whole GPUs."""
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("must be a whole number, or less than 1")
    return gpus


Gpus = Annotated[float, AfterValidator(_whole_if_many)]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_parse_object)]
IsoDate = Annotated[str, BeforeValidator(_parse_date)]


def validate(model: type[M], data: Mapping[str, Any], source: str) -> M:
    """Parses `data` as `model`. Raises UserError with one line: source, key, bad value and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(model, error)}") from None


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key is reported as unknown and as missing: prefer the first, which has a suggestion.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}"{nearest(str(problem["loc"][-1]), _keys(model, problem["loc"][:-1]))}'
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = re.sub(r"^(Input|\w+) should ", "must ", problem["msg"].removeprefix("Value error, "))
    return f"{key} = {redacted(repr(problem['input']))}, {message}" if key else message


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Returns the known keys of the nested model at `path`; empty if `path` leaves the models."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def nearest(key: str, known: list[str]) -> str:
    """Returns the suffix of an unknown-key error: the closest known key, or all of them."""
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f', did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}" if known else ""
