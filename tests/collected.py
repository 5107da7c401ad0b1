"""Helpers for tests of `collect`: a corpus with references, a pool of upstreams, and the upstreams' bills."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gateway import write_pool
from prefill_router.policy.pool import load_pool
from upstream import Call, Upstream


def write_prompts(path: Path, num_prompts: int) -> Path:
    """Writes prompts: "big" answers the even ones right, "small" those divisible by three."""
    rows = []
    for i in range(num_prompts):
        prompt = f"what is {i} plus one"
        known_by = [name for name, step in _KNOWS.items() if i % step == 0]
        references = [f"{name}: {prompt}" for name in known_by] or ["-"]
        rows.append({"prompt_id": f"p{i}", "prompt": prompt, "reference": references})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


_KNOWS = {"big": 2, "small": 3}


def is_right(prompt_id: str, target: str) -> bool:
    return int(prompt_id[1:]) % _KNOWS[target] == 0


def write_pool_of(path: Path, upstreams: Mapping[str, Upstream], **upstream: Any) -> str:
    """Writes a pool with a long timeout, for busy machines; pass `timeout_s` if upstreams hang."""
    return write_pool(path, upstreams, **{name: {"upstream": {"timeout_s": 60.0, **upstream}} for name in upstreams})


def outcomes(out: Path) -> list[dict[str, Any]]:
    return [row for file in (out / "outcomes").glob("*.parquet") for row in pq.ParquetFile(file).read().to_pylist()]


def answered(upstream: Upstream) -> list[Call]:
    """The calls that received a complete answer."""
    incomplete = {"cut", "truncated", "not_json", "error_midway", "error_first", "reset_midway", "stall", "empty"}
    return [call for call in upstream.completions if call.billed is not None and str(call.fault) not in incomplete]


def asked_twice(upstream: Upstream) -> list[str]:
    """The prompts that received a complete answer more than once."""
    counts = Counter(call.body["messages"][-1]["content"] for call in answered(upstream))
    return [prompt for prompt, count in counts.items() if count > 1]


def billed_usd(pool: str, upstreams: Mapping[str, Upstream]) -> float:
    """The cost that the upstreams billed, whether or not their answers arrived."""
    prices = {target.name: target for target in load_pool(pool).targets}
    return sum(
        prices[name].cost(call.billed.prompt_tokens, call.billed.completion_tokens, call.billed.cached_tokens)
        for name, upstream in upstreams.items()
        for call in upstream.completions
        if call.billed is not None
    )
