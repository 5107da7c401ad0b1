"""Prices of providers' models by name, from the table in the package `genai-prices`. Sends no requests.

The package is an extra: it brings an HTTP client of its own, and its version is the date of the prices, which whoever
pays should choose.
"""

from __future__ import annotations

import difflib
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

PACKAGE = "genai-prices"
_FIELDS = {
    "input_price": "input_mtok",
    "output_price": "output_mtok",
    "cached_input_price": "cache_read_mtok",
    "cache_write_price": "cache_write_mtok",
    "cache_write_long_price": "cache_write_1h_mtok",
}
_PER_REQUEST = "requests_kcount"
_UNKNOWN_KINDS = ("output_reasoning_mtok", "output_citation_mtok")  # of output, which a usage does not set apart
_NUM_NEAREST = 3


def table_version() -> str:
    """The table and its version, such as "genai-prices 0.2.3"."""
    return f"{PACKAGE} {version(PACKAGE)}"


def table_prices(name: str) -> dict[str, Any]:
    """Returns today's prices of a model, such as "openai/gpt-5-mini", as fields of a target.

    Raises ValueError if the package is missing, the table lacks the name, or a target cannot state the model's prices.
    """
    try:
        from genai_prices.data import providers  # 0.1 s, which only a pool that needs it takes
    except ImportError:
        raise ValueError(f"price_from needs {PACKAGE}: pip install 'prefill-router[prices]'") from None
    provider_id, _, model_ref = name.partition("/")
    provider = next((each for each in providers if each.id == provider_id), None)
    if provider is None:
        raise ValueError(_unknown(name, "provider", provider_id, [each.id for each in providers]))
    named = next((each for each in provider.models if each.id == model_ref), None)
    model = named or (provider.find_model(model_ref, all_providers=providers) if model_ref else None)
    if model is None:
        raise ValueError(_unknown(name, "model", model_ref, [each.id for each in provider.models]))
    if isinstance(model.prices, list) and any(hasattr(each.constraint, "start_time") for each in model.prices):
        raise ValueError(f'price_from = "{name}": its prices depend on the time of day: state input_price and others')
    return _fields(name, model.get_prices(datetime.now(UTC)))


def _fields(name: str, prices: Any) -> dict[str, Any]:
    stated = {field: getattr(prices, key) for field, key in _FIELDS.items()}
    stated = {field: price for field, price in stated.items() if price is not None}
    if not {"input_price", "output_price"} <= stated.keys() or any(getattr(prices, key) for key in _UNKNOWN_KINDS):
        raise ValueError(f'price_from = "{name}": is not priced by its input and output alone: state the prices')
    fields: dict[str, Any] = {field: _at(price, 0) for field, price in stated.items()}
    if bounds := sorted({tier.start for price in stated.values() for tier in getattr(price, "tiers", ())}):
        fields["tiers"] = [
            {"above": above, **{field: _at(price, above + 1) for field, price in stated.items()}} for above in bounds
        ]
    if (per_request := getattr(prices, _PER_REQUEST)) is not None:
        fields["usd_per_answer"] = _at(per_request, 0) / 1000
    return fields


def _at(price: Any, input_tokens: int) -> float:
    """The price of one kind of token, which may have tiers, in a call with so long an input."""
    tiers = [tier.price for tier in getattr(price, "tiers", ()) if input_tokens > tier.start]
    return float(tiers[-1] if tiers else getattr(price, "base", price))


def _unknown(name: str, what: str, given: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(given, known, _NUM_NEAREST, cutoff=0.0)
    return f'price_from = "{name}": no such {what} in {table_version()}, nearest: {", ".join(nearest)}'
