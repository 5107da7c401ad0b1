"""Stats against the ledger of an upstream that counts by itself: equal to the cent, and exactly but for rounding."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from billing_upstream import PRICE_LISTS, USD_PER_ANSWER, Bill, BillingUpstream
from gateway import Gateway

NUM_CALLS = 200  # of each pool
POOLS = ({"big": "tiered", "small": "message"}, {"big": "plain", "small": "free"})  # price lists of targets
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
ENDS = ("whole", "silent", "cut")


class Asked(NamedTuple):
    """A call of a target, in one of three APIs, and what the upstream bills for it."""

    target: str
    api: str
    is_stream: bool
    bill: Bill

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.target, "stream": self.is_stream}
        if self.api == "responses":
            return {**body, "input": self.bill.written_out()}
        body |= {"messages": [{"role": "user", "content": self.bill.written_out()}]}
        return {**body, **({"max_tokens": 20_000} if self.api == "messages" else {"n": self.bill.answers})}


def write_pool(path: Path, targets: Mapping[str, str], url: str) -> str:
    """Writes the upstream's price lists as a pool."""
    lines = []
    for target, model in targets.items():
        (_, *first), *tiers = PRICE_LISTS[model]
        is_openai = json.dumps(model != "message")
        way = f'base_url = "{url}/v1", model = "{model}", responses = {is_openai}'
        way += ', protocol = "anthropic"' if model == "message" else ""
        rows = [f"{{ above = {above}, {', '.join(_prices(prices))} }}" for above, *prices in tiers]
        stated = ['price_from = "lists/plain"'] if model == "plain" else _prices(first)
        lines += ["[[pool]]", f'name = "{target}"', *stated, f"tiers = [{', '.join(rows)}]"]
        lines += [f"usd_per_answer = {USD_PER_ANSWER.get(model, '0')}", f"upstream = {{ {way} }}"]
    path.write_text("\n".join(lines))
    return str(path)


def _prices(prices: list[Any]) -> list[str]:
    names = ("input", "output", "cached_input", "cache_write", "cache_write_long")
    return [f"{name}_price = {usd}" for name, usd in zip(names, prices, strict=True)]


def drawn(targets: Mapping[str, str], rng: random.Random) -> Asked:
    target, model = rng.choice(list(targets.items()))
    api = rng.choice(["chat", "messages"] if model == "message" else list(PATHS))
    lengths = [rng.randint(1, 20_000), rng.randint(190_000, 210_000), rng.randint(270_000, 450_000)]
    prompt = rng.choice([*lengths, *lengths, 200_000, 272_000, 272_001, 300_000])
    cached, written = (rng.choice([0, rng.randint(0, prompt // 2)]) for _ in range(2))
    bill = Bill(
        prompt,
        text=rng.randint(1, 4000),
        reasoning=rng.choice([0, rng.randint(1, 8000)]),
        reasoning_is_apart=rng.random() < 0.5,
        cached=cached,
        written=written,
        # A chat does not tell for how long.
        written_1h=rng.choice([0, written // 3, written]) if model == "message" or api == "responses" else 0,
        answers=rng.choice([1, 1, 2, 5]) if api == "chat" and model != "message" else 1,
        ends=rng.choices(ENDS, [8, 1, 1])[0],
    )
    return Asked(target, api, rng.random() < 0.5, bill)


async def send(url: str, calls: list[Asked]) -> Counter[int]:
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=httpx.Limits(max_connections=8)) as http:
        answers = await asyncio.gather(*(http.post(PATHS[call.api], json=call.body) for call in calls))
    return Counter(answer.status_code for answer in answers)


def stats_of(gateway: Gateway, num_calls: int) -> Any:
    """The stats once so many calls are booked."""
    deadline = time.monotonic() + 60.0
    while (stats := gateway.stats())["calls"] < num_calls:
        assert time.monotonic() < deadline
    return stats


@pytest.mark.slow("400 calls over real sockets")
def test_stats_are_what_the_upstream_counts(router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_router.policy.pool.table_prices", lambda _: {"input_price": 0.15, "output_price": 0.6})
    monkeypatch.setattr("prefill_router.policy.pool.table_version", lambda: "lists 1.0")
    rng = random.Random(24)
    rounds = [[drawn(targets, rng) for _ in range(NUM_CALLS)] for targets in POOLS]
    calls = [call for each in rounds for call in each]
    with BillingUpstream() as upstream:
        pools = [write_pool(tmp_path / f"{n}.toml", targets, upstream.url) for n, targets in enumerate(POOLS)]
        with Gateway(router=router, pool=pools[0]) as gateway:
            statuses = asyncio.run(send(gateway.url, rounds[0]))
            gateway.configure(pool=pools[1])
            statuses += asyncio.run(send(gateway.url, rounds[1]))
            stats = stats_of(gateway, len(calls))
    num_cut = sum(not call.is_stream and call.bill.ends == "cut" for call in calls)
    assert statuses == {200: len(calls) - num_cut, 502: num_cut}
    assert sum(upstream.calls.values()) == stats["calls"] == len(calls)
    assert stats["price_sources"] == {"big": "lists/plain (lists 1.0)"}

    billed = {end: sum(usd for (_, ended), usd in upstream.ledger.items() if ended == end) for end in ENDS}
    reported, *others = (stats["charged"][kind] for kind in ("reported", "estimated", "reserved"))
    assert billed["whole"] > 100
    assert round(Decimal(reported["cost_usd"]), 2) == round(Decimal(billed["whole"]), 2)
    assert reported["cost_usd"] == pytest.approx(float(billed["whole"]), rel=1e-12)
    assert reported["calls"] == sum(number for (_, end), number in upstream.calls.items() if end == "whole")
    # Of the others nothing is known but the prompt and the text: the gateway's own count, which says so.
    assert sum(charged["calls"] for charged in others) == len(calls) - reported["calls"]
    assert stats["actual_cost_usd"] == pytest.approx(sum(charged["cost_usd"] for charged in [reported, *others]))

    for name, target in stats["targets"].items():
        bills = [call.bill for call in calls if (call.target, call.bill.ends) == (name, "whole")]
        assert target["input_tokens"] == sum(bill.prompt for bill in bills)
        assert target["output_tokens"] == sum(bill.text * bill.answers + bill.reasoning for bill in bills)
        assert target["cached_tokens"] == sum(bill.cached for bill in bills)
        assert target["cache_write_tokens"] == sum(bill.written for bill in bills)
