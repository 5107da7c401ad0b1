"""How reports show numbers and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from prefill_router.common.money import usd
from prefill_router.metrics import Interval

Cell = str | tuple[str, str]  # a value, or a value and its interval
Table = list[list[Cell]]


def with_interval(figure: Interval, style: str) -> Cell:
    """A table cell with the value and, if it is finite, the interval."""
    value, low, high = figure
    if not isfinite(low):
        return shown(value, style)
    return shown(value, style), f"{shown(low, style)} to {shown(high, style)}"


def in_words(figure: Interval, style: str) -> str:
    """The value, with its interval in parentheses."""
    return as_text(with_interval(figure, style))


def as_text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell[0]} ({cell[1]})"


def shown(value: float, style: str) -> str:
    """The value as text. `style` is `%`, `$` (cost per prompt, shown per 1,000), `m` (thousandths) or a format."""
    if not isfinite(value):
        return "–"
    if style == "$":
        return usd(1e3 * value)
    value = 0.0 if abs(value) < 5e-7 else value  # avoids "-0.0%"
    if style in ("m", "+m"):
        return format(1e3 * value, f"{style[:-1]}.1f")
    return {"%": f"{value:.1%}", "+%": f"{value:+.1%}"}.get(style) or format(value, style)


def exactly(tolerance: float) -> str:
    """The tolerance with at least three decimals, and with as many more as it takes to read back the same number."""
    texts = (f"{tolerance:.{decimals}f}" for decimals in range(3, 18))
    return next((text for text in texts if float(text) == tolerance), str(tolerance))


def once(heads: Sequence[str], rows: Table, first: str, second: str) -> tuple[list[str], Table]:
    """The table with two columns, named by their heads, as one if all of their cells are equal."""
    i, k = heads.index(first), heads.index(second)
    if any(row[i] != row[k] for row in rows):
        return list(heads), rows
    named = [f"{first}, and {second}" if head == first else head for head in heads if head != second]
    return named, [[*row[:k], *row[k + 1 :]] for row in rows]
