"""Prices by name, from a stand-in with the shape of genai-prices; `benchmarks/prices.py` reads the real one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prefill_router.common.errors import UserError
from prefill_router.policy import price_table
from prefill_router.policy.pool import Target, load_pool


@dataclass
class Tier:
    start: int
    price: Decimal


@dataclass
class TieredPrices:
    base: Decimal
    tiers: list[Tier]


class ModelPrice:
    def __init__(self, **prices: Any) -> None:
        self.__dict__.update({f"{name}_mtok": price for name, price in prices.items()})

    def __getattr__(self, name: str) -> None:
        assert name.endswith(("_mtok", "_kcount"))


@dataclass
class StartDateConstraint:
    start_date: date


@dataclass
class TimeOfDateConstraint:
    start_time: time


@dataclass
class ConditionalPrice:
    constraint: Any
    prices: ModelPrice


@dataclass
class ModelInfo:
    id: str
    prices: Any

    def get_prices(self, at: datetime) -> ModelPrice:
        assert at.tzinfo is UTC
        return self.prices[-1].prices if isinstance(self.prices, list) else self.prices


@dataclass
class Provider:
    id: str
    models: list[ModelInfo] = field(default_factory=list)

    def find_model(self, model_ref: str, *, all_providers: list[Provider]) -> ModelInfo | None:
        assert self in all_providers
        return next((model for model in self.models if model_ref.startswith(model.id)), None)


MINI = ModelPrice(input=Decimal("0.25"), output=Decimal("2"), cache_read=Decimal("0.025"))
LONG = ModelPrice(
    input=TieredPrices(Decimal("2.5"), [Tier(272_000, Decimal("5")), Tier(500_000, Decimal("6"))]),
    output=TieredPrices(Decimal("15"), [Tier(272_000, Decimal("22.5"))]),
    cache_write=Decimal("3.125"),
    cache_write_1h=Decimal("5"),
)
PROVIDERS = [
    Provider(
        "openai",
        [
            ModelInfo("gpt-5-mini", MINI),
            ModelInfo("gpt-5.4", LONG),
            ModelInfo("embedding", ModelPrice(input=Decimal("0.02"))),
            ModelInfo("deep", ModelPrice(input=Decimal("1"), output=Decimal("2"), output_reasoning=Decimal("3"))),
            ModelInfo("cheaper", [ConditionalPrice(StartDateConstraint(date(2026, 1, 1)), MINI)]),
            ModelInfo("by-night", [ConditionalPrice(TimeOfDateConstraint(time(16)), MINI)]),
        ],
    ),
    Provider("anthropic", []),
]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ModuleType("genai_prices.data")
    data.providers = PROVIDERS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "genai_prices", ModuleType("genai_prices"))
    monkeypatch.setitem(sys.modules, "genai_prices.data", data)
    monkeypatch.setattr(price_table, "version", lambda _: "0.2.3")


def load(folder: Path, *lines: str) -> Target:
    path = folder / "pool.toml"
    path.write_text("\n".join(["[[pool]]", 'name = "x"', *lines]))
    return load_pool(str(path)).targets[0]


@pytest.mark.usefixtures("table")
def test_a_target_has_the_prices_of_its_name_and_says_where_from(tmp_path: Path) -> None:
    target = load(tmp_path, 'price_from = "openai/gpt-5-mini-2025-08-07"')
    assert (target.input_price, target.output_price, target.cached_input_price) == (0.25, 2.0, 0.025)
    assert (target.cache_write_price, target.tiers) == (None, ())
    assert target.is_priced
    pool = load_pool(str(tmp_path / "pool.toml"))
    assert pool.price_sources == {"x": "openai/gpt-5-mini-2025-08-07 (genai-prices 0.2.3)"}
    assert load(tmp_path, 'price_from = "openai/cheaper"').input_price == 0.25


@pytest.mark.usefixtures("table")
def test_the_tiers_of_each_kind_of_token_are_joined(tmp_path: Path) -> None:
    target = load(tmp_path, 'price_from = "openai/gpt-5.4"')
    assert target.cost(272_000, 1) == pytest.approx((272_000 * 2.5 + 15) / 1e6, rel=1e-12)
    assert target.cost(272_001, 1) == pytest.approx((272_001 * 5 + 22.5) / 1e6, rel=1e-12)
    assert target.cost(500_001, 1) == pytest.approx((500_001 * 6 + 22.5) / 1e6, rel=1e-12)
    assert [tier.cache_write_long_price for tier in target.tiers] == [5.0, 5.0]


@pytest.mark.usefixtures("table")
def test_prices_of_the_pool_replace_those_of_the_table(tmp_path: Path) -> None:
    target = load(tmp_path, 'price_from = "openai/gpt-5.4"', "input_price = 1.0", "tiers = []")
    assert (target.input_price, target.output_price, target.cache_write_price) == (1.0, 15.0, 3.125)
    assert target.tiers == ()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai/gtp-5-mini", "no such model in genai-prices 0.2.3, nearest: gpt-5-mini, "),
        ("openai/", "no such model"),
        ("openia/gpt-5-mini", "no such provider in genai-prices 0.2.3, nearest: openai, anthropic"),
        ("gpt-5-mini", "no such provider"),
        ("openai/embedding", "is not priced by its input and output alone: state the prices"),
        ("openai/deep", "is not priced by its input and output alone: state the prices"),
        ("openai/by-night", "its prices depend on the time of day: state input_price and others"),
    ],
)
def test_a_name_without_usable_prices_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf'pool\.toml: target "x": price_from = "{name}": .*{message}'):
        load(tmp_path, f'price_from = "{name}"')


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)
    with pytest.raises(UserError, match=r"price_from needs genai-prices: pip install 'prefill-router\[prices\]'"):
        load(tmp_path, 'price_from = "openai/gpt-5-mini"')


def test_an_artifact_is_read_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)
    kept = {"name": "x", "input_price": 1.0, "output_price": 2.0, "price_from": "a/b", "price_table": "t 1"}
    assert Target.model_validate(kept).model_dump() == kept
