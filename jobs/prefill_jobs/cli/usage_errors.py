"""Converts Typer's usage errors to one line, which names the nearest flag."""

from __future__ import annotations

import difflib
from typing import Any

import typer

from prefill_router.common.errors import UsageError

TyperUsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of click, or of Typer itself, by Typer's version


def usage_error(error: Any, program: str) -> UsageError | SystemExit:
    """Typer's usage error as one of ours."""
    message = _message(error)
    if not message:  # the command is only a group, whose help was printed
        return SystemExit(error.exit_code)
    path = error.ctx.command_path if error.ctx else program
    lead = path.replace(program, "", 1).lstrip()
    see = " See" if message.endswith("?") else ": see"
    return UsageError(f"{lead and lead + ': '}{message[0].lower()}{message[1:]}{see} {path} --help")


def _message(error: Any) -> str:
    """What a usage error says. Of an unknown flag, click lists up to three that are like it; this names the nearest."""
    flags = getattr(error, "possibilities", None)
    if not flags:
        return str(error.format_message().rstrip("."))
    names = [flag.lstrip("-") for flag in flags]  # with their dashes, short names of all kinds look alike
    close = difflib.get_close_matches(error.option_name.lstrip("-"), names, n=1)
    return f'{error.message}, did you mean "--{close[0]}"?' if close else str(error.message)
