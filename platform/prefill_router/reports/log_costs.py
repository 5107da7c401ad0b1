"""What a query log costs under each choice, as the label report's table and figure show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

CostPoint = tuple[float, float]  # cost of the whole log in USD, and expected accuracy


class LogCosts(NamedTuple):
    """Points of the router and of single targets."""

    chosen: CostPoint
    curve: Sequence[CostPoint]  # of the router, over all tolerances
    tolerances: Mapping[float, CostPoint]  # some of the curve's points, by tolerance
    singles: Mapping[str, CostPoint]  # by target
    rule: str  # by which the choice was made, such as "tolerance 0.020"
