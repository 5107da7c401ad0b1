"""Pools: the targets that a router chooses from, with their prices and upstreams."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from prefill_router import storage
from prefill_router.common import validation
from prefill_router.common.errors import UserError
from prefill_router.policy import key_variables, request_settings
from prefill_router.policy.price_table import table_prices, table_version
from prefill_router.policy.token_prices import PriceTier, Rates, check_tiers, rates_of

_ANTHROPIC_VERSION = "2023-06-01"  # the only version of its API so far


class Upstream(validation.SparseModel):
    """An API that serves a target: OpenAI-compatible, or Anthropic's."""

    base_url: str = Field(
        pattern=r"^https?://[^\s@?#]+$", description="Base URL, such as https://api.openai.com/v1, without a key"
    )
    protocol: Literal["openai", "anthropic"] = Field(
        "openai", description="API of the upstream: chat completions, or Anthropic's Messages"
    )
    model: str | None = Field(None, min_length=1, description="Model name at the upstream [the target's name]")
    allow_http: bool = Field(False, description="Allow sending the key over plain http, in a trusted network")
    key_env: str | None = Field(None, description="Environment variable with the API key, such as EXAMPLE_API_KEY")
    responses: bool = Field(False, description="Supports POST /responses (OpenAI's protocol only)")
    concurrency: int = Field(256, ge=1, description="Concurrent calls per replica")
    requests_per_minute: float | None = Field(None, gt=0.0, description="Rate limit of `collect`")
    tokens_per_minute: float | None = Field(
        None, gt=0.0, description="Rate limit of `collect`, prompts and answers together"
    )
    limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name of the request field that limits output tokens"
    )
    max_image_tokens: int = Field(
        2000, ge=0, description="Most input tokens that an image counts, for hard limits (gpt-4o-mini: 48,200)"
    )
    timeout_s: float = Field(60.0, gt=0.0, description="For the whole answer, or if streamed, for each event")
    extra_body: dict[str, JsonValue] = Field({}, description="Request fields that replace the caller's")
    headers: dict[str, str] = Field({}, description="Further request headers, without credentials")
    system_prefix: str | None = Field(None, min_length=1, description="Text put before the system message")
    drop: tuple[str, ...] = Field((), description="Request fields that are not sent")
    rename: dict[str, str] = Field({}, description="Request fields that are sent under another name")

    @field_validator("key_env")
    @classmethod
    def _is_safe_to_send(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None:
            key_variables.check_name(name)
            if "base_url" in info.data and not info.data.get("allow_http"):
                key_variables.check_transport(info.data["base_url"])
        return name

    @field_validator("extra_body", "drop")
    @classmethod
    def _leave_the_call(cls, names: Any) -> Any:
        request_settings.check_fields(names)
        return names

    @field_validator("headers")
    @classmethod
    def _are_sendable(cls, headers: dict[str, str]) -> dict[str, str]:
        request_settings.check_headers(headers)
        return headers

    @field_validator("rename")
    @classmethod
    def _are_names(cls, names: dict[str, str]) -> dict[str, str]:
        request_settings.check_renamed(names)
        return names

    def url(self, path: str) -> str:
        return f"{self.base_url.rstrip('/')}{path}"

    @property
    def key(self) -> str | None:
        """The API key, read from the environment now; None if the upstream needs none."""
        return None if self.key_env is None else key_variables.value(self.key_env)

    @property
    def max_added_tokens(self) -> int:
        """An upper bound on the input tokens that the target's own settings add to a call: one per byte."""
        return len((self.system_prefix or "").encode()) + (len(json.dumps(self.extra_body)) if self.extra_body else 0)

    @property
    def request_headers(self) -> dict[str, str]:
        """Headers of a request with a JSON body."""
        headers = {**self.headers, "content-type": "application/json", "accept-encoding": "identity"}
        if self.protocol == "anthropic":
            headers["anthropic-version"] = _ANTHROPIC_VERSION
        if (key := self.key) is not None:
            headers |= {"x-api-key": key} if self.protocol == "anthropic" else {"authorization": f"Bearer {key}"}
        return headers


class Target(validation.SparseModel):
    """A candidate model. Prices are USD per million tokens, and USD per answer."""

    name: str = Field(min_length=1)
    input_price: float = Field(0.0, ge=0.0)
    output_price: float = Field(0.0, ge=0.0)
    usd_per_answer: float = Field(0.0, ge=0.0, description="Price of an answer, besides that of its tokens")
    cached_input_price: float | None = Field(None, ge=0.0, description="Price of cached input tokens [input_price]")
    cache_life_s: float = Field(300.0, ge=0.0, description="Seconds after which an unused cached prefix counts as lost")
    cache_write_price: float | None = Field(None, ge=0.0, description="Price of tokens put in a cache [input_price]")
    cache_write_long_price: float | None = Field(None, ge=0.0, description="The same, kept longer [cache_write_price]")
    tiers: tuple[PriceTier, ...] = Field((), description="Prices of calls with long inputs, in ascending order")
    price_from: str | None = Field(None, description="Model of genai-prices whose prices hold where none are stated")
    price_table: str | None = Field(None, description="The table and its version, set when the pool is loaded")
    context_tokens: int | None = Field(None, ge=1, description="Context window, prompt and answer together")
    ttft_s: float | None = Field(None, gt=0.0, description="Seconds to the first token, until the gateway knows them")
    tokens_per_s: float | None = Field(
        None, gt=0.0, description="Output tokens per second, until the gateway knows them"
    )
    tools: bool = Field(True, description="Supports tool calls")
    images: bool = Field(True, description="Supports image input")
    upstream: Upstream | None = None

    @model_validator(mode="after")
    def _has_both_prices(self) -> Self:
        given = self.model_fields_set & {"input_price", "output_price"}
        if len(given) == 1:
            raise ValueError(f"{'output_price' if 'input_price' in given else 'input_price'} is missing")
        if self.tiers and not given:
            raise ValueError("input_price is missing: tiers are prices of long inputs alone")
        check_tiers(self, self.tiers)
        return self

    @property
    def is_priced(self) -> bool:
        """Whether the pool's file gives a price; without one, `train` fills in `usd_per_answer` from billed costs."""
        return bool(self.model_fields_set & {"input_price", "usd_per_answer"})

    def rates(self, input_tokens: float) -> Rates:
        """The prices of tokens in a call with so long an input."""
        return rates_of(next((tier for tier in reversed(self.tiers) if input_tokens > tier.above), self))

    def cost(
        self,
        input_tokens: float,
        output_tokens: float,
        cached_tokens: float = 0.0,
        cache_write_tokens: float = 0.0,
        cache_write_long_tokens: float = 0.0,
        *,
        num_answers: int = 1,
    ) -> float:
        """Returns the cost of a call in USD, from the fields of its Usage. Several answers share one input."""
        rates = self.rates(input_tokens)
        full = input_tokens - cached_tokens - cache_write_tokens
        written_usd = (cache_write_tokens - cache_write_long_tokens) * rates.cache_write
        written_usd += cache_write_long_tokens * rates.cache_write_long
        tokens_usd = full * rates.input + cached_tokens * rates.cached + written_usd + output_tokens * rates.output
        return tokens_usd / 1e6 + num_answers * self.usd_per_answer

    def most_cost(self, input_tokens: float, output_tokens: float, num_answers: int = 1) -> float:
        """Returns the most that a call with at most so many tokens can cost in USD, whatever is put in a cache."""
        all_rates = [rates_of(self), *(rates_of(tier) for tier in self.tiers if input_tokens > tier.above)]
        input_price = max(rates.dearest_input for rates in all_rates)
        output_price = max(rates.output for rates in all_rates)
        return (input_tokens * input_price + output_tokens * output_price) / 1e6 + num_answers * self.usd_per_answer


class Pool(validation.StrictModel):
    """A named list of targets, in the order of the file. Ties in a choice go to the earlier target."""

    name: str
    targets: tuple[Target, ...] = Field(min_length=1)

    @property
    def target_names(self) -> list[str]:
        return [target.name for target in self.targets]

    @property
    def prices(self) -> dict[str, tuple[float, ...]]:
        """USD per million input and output tokens, and per answer, by target; then bound and prices of each tier."""
        return {
            t.name: (
                *(t.input_price, t.output_price, t.usd_per_answer),
                *(value for tier in t.tiers for value in (tier.above, tier.input_price, tier.output_price)),
            )
            for t in self.targets
        }

    @property
    def price_sources(self) -> dict[str, str]:
        """The name and the table from which prices were taken, by target."""
        return {t.name: f"{t.price_from} ({t.price_table})" for t in self.targets if t.price_from is not None}

    def token_prices(self, input_tokens: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns USD per million tokens of inputs with lengths (N,), and of their outputs, each (N, T) or (1, T)."""
        input_prices = np.array([[target.input_price for target in self.targets]])
        output_prices = np.array([[target.output_price for target in self.targets]])
        for t, target in enumerate(self.targets):
            for tier in target.tiers:
                is_above = np.asarray(input_tokens)[:, None] > tier.above
                at_target = np.arange(len(self.targets)) == t
                input_prices = np.where(is_above & at_target, tier.input_price, input_prices)
                output_prices = np.where(is_above & at_target, tier.output_price, output_prices)
        return input_prices, output_prices

    def expected_cost(self, input_tokens: NDArray[Any], output_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the expected cost (N, T) in USD, from `input_tokens` (N,) and expected `output_tokens` (N, T).

        input_tokens * input_price + E[output_tokens_t] * output_price + usd_per_answer, at the prices of the input's
        length. Source: platform/METHOD.md, "Choosing".
        """
        input_price, output_price = self.token_prices(input_tokens)
        usd_per_answer = np.array([target.usd_per_answer for target in self.targets])
        of_input = np.asarray(input_tokens, np.float64)[:, None] * (input_price / 1e6)
        return np.asarray(of_input + output_tokens * (output_price / 1e6) + usd_per_answer)


def load_pool(uri: str, *, prices_optional: bool = False) -> Pool:
    """Reads the pool `pool.toml#name` from a file of `[[name]]` tables; `#name` is optional if the file has one pool.

    Raises UserError for a missing or negative price, a repeated target, or an unknown key or pool. With
    `prices_optional`, a target may lack all prices.
    """
    path, _, name = uri.rpartition("#") if "#" in storage.name(uri) else (uri, "", "")
    pools = storage.read_toml(path)
    if not pools:
        raise UserError(f"{path}: has no pool: list targets as [[NAME]] tables")
    if not name and len(pools) != 1:
        raise UserError(f"{path}: has {len(pools)} pools ({', '.join(pools)}): select one with {path}#NAME")
    name = name or next(iter(pools))
    if name not in pools:
        raise UserError(f'{path}: no pool "{name}": select one of {", ".join(pools)}')
    if not isinstance(pools[name], list) or not pools[name]:
        raise UserError(f"{path}: {name} must be a list of targets, each [[{name}]] with name and prices")
    targets = tuple(_target(entry, path, name, i) for i, entry in enumerate(pools[name]))
    names = [t.name for t in targets]
    repeated = next((n for n in names if names.count(n) > 1), None)
    if repeated is not None:
        raise UserError(f'{path}: target "{repeated}" is repeated in pool "{name}": give each target a unique name')
    unpriced = next((t.name for t in targets if not t.is_priced), None)
    if unpriced is not None and not prices_optional:
        raise UserError(
            f'{path}: target "{unpriced}": input_price is missing: give input_price and output_price, or usd_per_answer'
        )
    return Pool(name=name, targets=targets)


def _target(entry: Any, path: str, pool: str, index: int) -> Target:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {pool}[{index}] = {entry!r}, must be a table with name, input_price and output_price")
    label = f'target "{entry["name"]}"' if "name" in entry else f"{pool}[{index}]"
    if isinstance(entry.get("price_from"), str):
        try:
            entry = {**table_prices(entry["price_from"]), **entry, "price_table": table_version()}
        except ValueError as error:
            raise UserError(f"{path}: {label}: {error}") from None
    return validation.validate(Target, entry, f"{path}: {label}")
