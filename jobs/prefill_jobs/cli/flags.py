"""Builds commands whose flags are the fields of config models. Flags override the tables of a TOML file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from prefill_jobs.option_fields import CONFIG_FILE, POSITIONAL, must_be_given, schema_extra
from prefill_jobs.options import load_command
from prefill_router.common.errors import UsageError
from prefill_router.common.validation import StrictModel, validate

_CONFIG_HELP = "TOML file with one table per command; flags override it"

Read = Callable[[], Any]  # builds a command's config from its flags and the current content of its TOML file


def add_command(app: typer.Typer, name: str, models: Mapping[str, type[StrictModel]], run: Callable[..., None]) -> None:
    """Adds the command `name` to `app`. Its flags are the fields of `models`, which are keyed by TOML table.

    `run` receives one `Read` per model. The docstring of the first model is the command's help.
    """

    def command(config: str | None, **flags: Any) -> None:
        run(*(partial(_merge, table, model, flags, config) for table, model in models.items()))

    parameters = [_flag(key, field) for model in models.values() for key, field in model.model_fields.items()]
    parameters.append(_parameter("config", str, typer.Option("--config", help=_CONFIG_HELP, show_default=False)))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=inspect.getdoc(next(iter(models.values()))))(command)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    kind: Any = next((t for t in (bool, int, float) if t in kinds), str)
    if getattr(field.annotation, "__origin__", None) is tuple:
        kind = list[str]
    note = " [required]" if field.is_required() else ""
    if not field.is_required() and (field.default or type(field.default) in (int, float)):
        note = f" [default: {field.default}]"
    if schema_extra(field).get(POSITIONAL):
        return _parameter(name, kind, typer.Argument(help=field.description, show_default=False))
    text = f"{field.description}{note}".replace("[", r"\[")
    return _parameter(name, kind, typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False))


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _merge(table: str, model: type[StrictModel], flags: Mapping[str, Any], uri: str | None) -> StrictModel:
    own_file = next((key for key, field in model.model_fields.items() if schema_extra(field).get(CONFIG_FILE)), None)
    uri = uri or (flags[own_file] if own_file else None)
    given = {key: flags[key] for key in model.model_fields if flags[key] not in (None, [])}
    values = {**(load_command(uri, table) if uri else {}), **given}
    for key in model.model_fields:
        if must_be_given(model, key, values):
            is_positional = schema_extra(model.model_fields[key]).get(POSITIONAL)
            name = key.upper() if is_positional else f"--{key.replace('_', '-')}"
            raise UsageError(f"{table}: {name} is missing: give it, or set {key} in table [{table}] of --config")
    return validate(model, values, table)
