"""Prices of tokens: they depend on the kind of token, and may rise with the length of the input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pydantic import Field

from prefill_router.common.validation import SparseModel


class TokenPrices(Protocol):
    """Prices in USD per million tokens, as a target or one of its tiers states them."""

    @property
    def input_price(self) -> float: ...
    @property
    def output_price(self) -> float: ...
    @property
    def cached_input_price(self) -> float | None: ...
    @property
    def cache_write_price(self) -> float | None: ...
    @property
    def cache_write_long_price(self) -> float | None: ...


class PriceTier(SparseModel):
    """Prices of all tokens of a call whose input, cached tokens included, is above a number of tokens."""

    above: int = Field(ge=1)
    input_price: float = Field(ge=0.0)
    output_price: float = Field(ge=0.0)
    cached_input_price: float | None = Field(None, ge=0.0)
    cache_write_price: float | None = Field(None, ge=0.0)
    cache_write_long_price: float | None = Field(None, ge=0.0)


class Rates(NamedTuple):
    """The price of each kind of token, in USD per million."""

    input: float
    output: float
    cached: float
    cache_write: float
    cache_write_long: float

    @property
    def dearest_input(self) -> float:
        return max(self.input, self.cached, self.cache_write, self.cache_write_long)


def rates_of(prices: TokenPrices) -> Rates:
    """The prices with defaults: the cache costs what other input does, however long it is kept."""
    cached, written, written_long = prices.cached_input_price, prices.cache_write_price, prices.cache_write_long_price
    written = prices.input_price if written is None else written
    return Rates(
        prices.input_price,
        prices.output_price,
        prices.input_price if cached is None else cached,
        written,
        written if written_long is None else written_long,
    )


def check_tiers(prices: TokenPrices, tiers: Iterable[PriceTier]) -> None:
    """Raises ValueError unless tiers ascend, and each of them states all prices that the target states."""
    above = 0
    for tier in tiers:
        if tier.above <= above:
            raise ValueError(f"tiers: above = {tier.above}, must be more than in the tier before, {above}")
        above = tier.above
        for name in ("cached_input_price", "cache_write_price", "cache_write_long_price"):
            if getattr(prices, name) is not None and getattr(tier, name) is None:
                raise ValueError(
                    f"tiers: {name} is missing above {above}: state it, as the target does for shorter inputs"
                )
