"""The errors that users read: `UserError` of an input that they can put right, `UnfitError` of one row among many."""

from __future__ import annotations

import itertools
import json


class UserError(ValueError):
    """Says which input is bad, its value, and the remedy: `pool.toml: target "x": output_price = -1, must be >= 0`.

    Entry points print it as a line and exit with `exit_code`.
    """

    exit_code = 1


class UnfitError(ValueError):
    """Why a value cannot stand in a row: the key, the value and what it must be."""


def one_line(error: BaseException) -> str:
    """All that an error says, in one line without a full stop; its kind where it says nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def shown(value: object) -> str:
    """A value as JSON, cut to 60 characters; of a gigantic or deeply nested one no more is written."""
    short = value[:60] if isinstance(value, str) else value
    text = "".join(itertools.islice(json.JSONEncoder(default=str).iterencode(short), 61))
    return text if len(text) <= 60 else text[:57] + "..."
