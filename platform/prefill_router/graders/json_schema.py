"""The `json_schema` grader: finds JSON in an answer, in a code fence or in a sentence, and validates it."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Annotated, Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.validators import extend, validator_for
from pydantic import AfterValidator
from referencing import Registry
from referencing.exceptions import Unresolvable

from prefill_router.graders.fences import fences
from prefill_router.graders.grade import Grade, Row, lacking, missing, nested, right, short, wrong
from prefill_router.graders.registry import grader

_PATTERN_S = 1.0  # time limit per string: a pattern may backtrack for ever
_NOTHING = object()
_OPENING = re.compile(r"[{\[]")
# Limits how many characters may be parsed in vain: per character of the answer, plus a fixed number.
_MAX_WASTE_PER_CHAR, _MAX_WASTE_FIXED = 8, 20_000


def checked_schema(schema: Any) -> Any:
    """Returns a valid schema. Raises ValueError otherwise."""
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"is not a JSON schema: {error.message}") from None
    return schema


def _unfit(row: Row, options: Mapping[str, Any]) -> str | None:
    column = options["column"]
    if options["schema"] is not None:
        return None
    if reason := lacking(row, column):
        return reason
    try:
        checked_schema(nested(row[column]))
    except ValueError as error:
        return f"{column} {short(error)}"
    return None


@grader("json_schema", unfit=_unfit)
def json_schema(
    answer: str,
    row: Row,
    *,
    schema: Annotated[dict[str, Any], AfterValidator(checked_schema)] | None = None,
    column: str = "schema",
) -> Grade:
    """Validates against one `schema` for all rows, or each row's own in `column`, as JSON text or nested values.

    Nothing is fetched: if the schema refers to another file, the grade is missing.
    """
    if schema is None:
        schema = nested(row[column])
    value = find_json(answer)
    if value is _NOTHING:
        return wrong("no JSON in the answer")
    try:
        fault = best_match(_validator(schema).iter_errors(value))
    except (Unresolvable, TimeoutError, regex.error) as error:
        return missing(f"the schema cannot be checked: {short(error)}")
    return right("meets the schema") if fault is None else wrong(f"{fault.json_path}: {short(fault.message)}")


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not regex.search(pattern, value, timeout=_PATTERN_S):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], value: Any, _: Any) -> Iterator[ValidationError]:
    for pattern, schema in patterns.items() if isinstance(value, dict) else ():
        for name in _matching(value, pattern):
            yield from validator.descend(value[name], schema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, schema: Any, value: Any, whole: Any) -> Iterator[ValidationError]:
    if not isinstance(value, dict):
        return
    known = set(whole.get("properties", ())).union(*(_matching(value, p) for p in whole.get("patternProperties", ())))
    for name in [name for name in value if name not in known]:
        if schema is False:
            yield ValidationError(f"{name!r} is not a property of the schema")
        else:
            yield from validator.descend(value[name], schema, path=name)


def _matching(names: Mapping[str, Any], pattern: str) -> list[str]:
    return [name for name in names if regex.search(pattern, name, timeout=_PATTERN_S)]


def _unique_items(_: Any, is_on: Any, value: Any, __: Any) -> Iterator[ValidationError]:
    """Replaces the library's check, whose time grows with the square of the items."""
    if is_on and isinstance(value, list) and len(set(map(_hashable, value))) < len(value):
        yield ValidationError(f"{short(value)} has equal items")


def _hashable(value: Any) -> Hashable:
    """A hashable value, equal for values that are equal in JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else (isinstance(value, bool), value)


_KEYWORDS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
}


def _validator(schema: Mapping[str, Any]) -> Any:
    """The validator of the schema's own draft, with an empty registry: the default one fetches from the network."""
    kind = extend(validator_for(schema, default=Draft202012Validator), _KEYWORDS)
    return kind(schema, registry=Registry())


def find_json(answer: str) -> Any:
    """The JSON value of the whole answer, else of its last fence in JSON, else its last object or array."""
    for text in [answer, *(fence.text for fence in reversed(fences(answer)))]:
        try:
            return json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
    return _last_inside(answer)


def _last_inside(answer: str) -> Any:
    """The last object or array. The limit on failed parsing keeps the time linear in the answer's length."""
    decoder, found, at = json.JSONDecoder(parse_constant=_refuse), _NOTHING, 0
    left = _MAX_WASTE_PER_CHAR * len(answer) + _MAX_WASTE_FIXED
    while left > 0 and (match := _OPENING.search(answer, at)):
        try:
            found, at = decoder.raw_decode(answer, match.start())
        except (ValueError, RecursionError) as error:
            at = match.start() + 1
            left -= getattr(error, "pos", len(answer)) - match.start() + 1
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
