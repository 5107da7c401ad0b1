"""The real table of prices: what it takes to load, and our costs beside those of the package that carries it.

    pip install '.[prices]' && python tests/benchmarks/prices.py --usages 50

Every model is looked up by its name and priced by drawn usages: with and without a cache, of short and long inputs.
The exit status is 1 if a cost differs from the package's own. One JSON line is printed last.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import files
from typing import Any

from prefill_router.common.usage import Usage
from prefill_router.policy.pool import Target
from prefill_router.policy.price_table import PACKAGE, table_prices, table_version

LONGEST = 600_000


def drawn(rng: random.Random, prices: Any) -> Usage:
    """A usage of tokens of the kinds that have a price: the package refuses others."""
    length = rng.choice([rng.randint(0, 2_000), rng.randint(0, LONGEST), 200_000, 200_001, 272_000, 272_001])
    cached = rng.randint(0, length // 3) if prices.cache_read_mtok is not None else 0
    written = rng.randint(0, length // 3) if prices.cache_write_mtok is not None else 0
    written_1h = rng.randint(0, written) if prices.cache_write_1h_mtok is not None else 0
    return Usage(length, rng.randint(0, 5_000), cached, written, written_1h)


def package_usd(model: Any, provider: Any, usage: Usage) -> float:
    from genai_prices import Usage as Theirs

    parts = {
        "cache_read_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "cache_write_1h_tokens": usage.cache_write_long_tokens,
    }
    given = {name: number for name, number in parts.items() if number}
    theirs = Theirs(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, **given)
    return float(model.calc_price(theirs, provider).total_price)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--usages", type=int, default=50, help="of each model")
    config = parser.parse_args()
    before_s, before_kib = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table_prices("openai/gpt-5-mini")
    load = {
        "cpu_s": round(time.process_time() - before_s, 3),
        "mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024, 1),
        "disk_mib": round(sum(file.locate().stat().st_size for file in files(PACKAGE) or () if file.size) / 2**20, 2),  # type: ignore[attr-defined]
    }
    from genai_prices.data import providers

    rng, counts, worst = random.Random(0), Counter[str](), 0.0
    for provider in providers:
        for model in provider.models:
            try:
                fields = table_prices(f"{provider.id}/{model.id}")
            except ValueError as error:
                counts[str(error).partition(": ")[2].partition(" in genai")[0]] += 1
                continue
            target, prices = Target.model_validate({"name": "x", **fields}), model.get_prices(datetime.now(UTC))
            counts["tiered" if target.tiers else "flat"] += 1
            for _ in range(config.usages):
                usage = drawn(rng, prices)
                theirs = package_usd(model, provider, usage)
                worst = max(worst, abs(target.cost(*usage) - theirs) / max(theirs, 1e-12))
    result = {"table": table_version(), "load": load, "models": dict(counts), "worst_relative_difference": worst}
    sys.stdout.write(json.dumps(result) + "\n")
    return int(worst > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
