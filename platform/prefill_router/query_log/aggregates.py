"""Totals of a log (costs, P(correct), targets), computed shard by shard and merged in any order."""

# N lines, T targets, K tolerances

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefill_router.metrics import Sweep
from prefill_router.policy.selection import NO_TARGET, OUT_OF_DISTRIBUTION_SHARE

# Fine enough that a report can pick points that differ in cost, which needs small steps where most choices change.
TOLERANCES = (*(k / 500 for k in range(50)), *(k / 100 for k in range(10, 40)), *(k / 20 for k in range(8, 21)))
EVERYTHING = ("", "")  # the segment of all lines
OTHERS = "(others)"
UNKNOWN = "unknown"  # the value of a line without one
_MAX_VALUES = 1000  # segments of one column; further values count as OTHERS

Segment = tuple[str, str]  # a column and a value


class Lines(NamedTuple):
    """N lines of a log. Targets are indices into the pool that the log is routed to."""

    input_tokens: NDArray[np.int64]  # (N,)
    p_correct: NDArray[np.float64]  # (N, T)
    cost_usd: NDArray[np.float64]  # (N, T) expected
    percentile: NDArray[np.float32]  # (N,) share of training prompts that are nearer, NaN where unknown
    chosen: NDArray[np.int64]  # (N,)
    used: NDArray[np.int64]  # (N,) the target that answered, according to the log; NO_TARGET if not in the pool
    used_cost_usd: NDArray[np.float64]  # (N,) NaN where the log has no cost

    def take(self, rows: NDArray[Any]) -> Lines:
        return Lines(*(values[rows] for values in self))


@dataclass
class Sums:
    """Named sums over the lines of one segment; sums of different lines can be added."""

    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, other: Mapping[str, NDArray[np.float64]]) -> None:
        for name, value in other.items():
            self.values[name] = self.values[name] + value if name in self.values else value

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.values[name]

    def total(self, name: str) -> float:
        return float(self.values[name].sum())

    def share(self, name: str, of: str = "lines") -> float:
        """Returns one sum divided by another; NaN if the latter is 0."""
        whole = self.total(of)
        return self.total(name) / whole if whole else float("nan")


@dataclass
class Tally:
    """Sums by segment: all lines, and the lines with the same value in a column."""

    segments: dict[Segment, Sums] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Lines, columns: Mapping[str, Sequence[str]], eligible: NDArray[np.bool_]) -> Tally:
        """`columns` maps a column's name to the value of each line; `eligible` (N, T) are the permitted targets."""
        tally = cls({EVERYTHING: Sums(_sums(lines) | _at_tolerances(lines, eligible))})
        for column, values in columns.items():
            names, places = np.unique(np.asarray(values, object).astype(str), return_inverse=True)
            for i, name in enumerate(names.tolist()):
                tally.segments[column, name] = Sums(_sums(lines.take(np.flatnonzero(places == i))))
        return tally

    def merge(self, other: Tally) -> Tally:
        """Adds another tally to this one, and returns this one."""
        for segment, sums in other.segments.items():
            self._sums_of(segment).add(sums.values)
        return self

    def _sums_of(self, segment: Segment) -> Sums:
        column, _ = segment
        if segment not in self.segments and len(self.values_of(column)) >= _MAX_VALUES:
            segment = column, OTHERS
        return self.segments.setdefault(segment, Sums())

    @property
    def everything(self) -> Sums:
        return self.segments[EVERYTHING]

    @property
    def columns(self) -> list[str]:
        return sorted({column for column, _ in self.segments} - {""})

    def values_of(self, column: str) -> list[str]:
        return sorted(value for name, value in self.segments if name == column)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"column": column, "value": value, "sums": {name: x.tolist() for name, x in sums.values.items()}}
            for (column, value), sums in self.segments.items()
        ]

    @classmethod
    def from_json(cls, content: Sequence[Mapping[str, Any]]) -> Tally:
        def sums(entry: Mapping[str, Any]) -> Sums:
            return Sums({name: np.asarray(values, np.float64) for name, values in entry["sums"].items()})

        return cls({(entry["column"], entry["value"]): sums(entry) for entry in content})


def day_of(value: object) -> str:
    """Returns the UTC day of a date, a time in ISO 8601, or seconds or milliseconds since 1970; UNKNOWN if invalid."""
    try:
        if isinstance(value, str):
            value = float(value) if value.replace(".", "", 1).isdigit() else datetime.fromisoformat(value)
        if isinstance(value, (int, float)):
            value = datetime.fromtimestamp(value / 1e3 if value > 1e11 else value, UTC)
        if isinstance(value, datetime):
            value = (value.astimezone(UTC) if value.tzinfo is not None else value).date()
    except (ValueError, OverflowError, OSError):
        return UNKNOWN
    return value.isoformat() if isinstance(value, date) else UNKNOWN


def _sums(lines: Lines) -> dict[str, NDArray[np.float64]]:
    num_targets, chosen = lines.p_correct.shape[1], lines.chosen
    is_known, is_paid = ~np.isnan(lines.percentile), ~np.isnan(lines.used_cost_usd)
    used = np.where(is_paid, lines.used, NO_TARGET)
    instead = np.where(used != NO_TARGET, chosen, NO_TARGET)
    sums: dict[str, Any] = {
        "lines": len(lines.chosen),
        "input_tokens": lines.input_tokens.sum(),
        "cost_usd": lines.cost_usd.sum(0),
        "correct": lines.p_correct.sum(0),
        "chosen": np.bincount(chosen[chosen != NO_TARGET], minlength=num_targets),
        "chosen_cost_usd": _picked(lines.cost_usd, chosen),
        "chosen_correct": _picked(lines.p_correct, chosen),
        "placed": is_known.sum(),
        "strangers": (lines.percentile[is_known] >= OUT_OF_DISTRIBUTION_SHARE).sum(),
        "percentile": lines.percentile[is_known].sum(dtype=np.float64),
        "used": np.bincount(used[used != NO_TARGET], minlength=num_targets),
        "used_cost_usd": lines.used_cost_usd[used != NO_TARGET].sum(),
        "used_correct": _picked(lines.p_correct, used),
        "used_expected_cost_usd": _picked(lines.cost_usd, used),
        "instead_cost_usd": _picked(lines.cost_usd, instead),
        "instead_correct": _picked(lines.p_correct, instead),
    }
    return {name: np.asarray(value, np.float64) for name, value in sums.items()}


def _at_tolerances(lines: Lines, eligible: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    rows = np.flatnonzero(eligible.any(1))  # the other lines have no target at any tolerance
    p, cost = lines.p_correct[rows], lines.cost_usd[rows]
    costs = correct = np.zeros(len(TOLERANCES))
    if len(rows):
        sweep = Sweep(p, np.where(eligible[rows], p, -np.inf), cost, cost)
        points = sweep.points_at(TOLERANCES, np.ones((1, len(rows))))
        costs, correct = (len(rows) * means[0] for means in (points.costs, points.accuracies))
    return {"tolerance_cost_usd": costs, "tolerance_correct": correct}


def _picked(values: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """Sums values (N, T) at each line's target (N,), without lines that have none."""
    rows = np.flatnonzero(targets != NO_TARGET)
    return float(values[rows, targets[rows]].sum())
