"""Errors that users read.

`UserError` for an input that they can correct, `UsageError` for a command line, `InvalidRowError` for one invalid row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection


class UserError(ValueError):
    """Names the bad input, its value and the remedy: `pool.toml: target "x": output_price = -1, must be >= 0`.

    Entry points print the message as one line and exit with `exit_code`.
    """

    exit_code = 1


class UsageError(UserError):
    """A command line is not understood: an unknown command or option, or one that is missing."""

    exit_code = 2


class InvalidRowError(ValueError):
    """A value makes a row invalid. The message gives the key, the value and what is allowed."""


def one_line(error: BaseException) -> str:
    """Returns an error's message as one line without a full stop, or its type if the message is empty."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def shown(value: object) -> str:
    """Returns a value as JSON, cut to 60 characters. Large or deeply nested values are not serialised in full."""
    short = value[:60] if isinstance(value, str) else value
    text = "".join(itertools.islice(json.JSONEncoder(default=str).iterencode(short), 61))
    return text if len(text) <= 60 else text[:57] + "..."


def some_of(names: Collection[str]) -> str:
    """Names in order, as text: the first eight, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8:,} more" if len(ordered) > 8 else "")
