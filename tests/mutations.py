"""Invalid request bodies, as from careless or hostile callers."""

from __future__ import annotations

import random
from typing import Any

ODD: list[Any] = [
    *(None, True, [], {}, "", " ", "\ud800", "\x00", "é" * 50, 0, -1, 1e308, 10**40, float("nan"), float("inf")),
    *([[]], {"a": 1}, ["big"] * 3, "big", "nobody", [{"role": "user"}], {"type": "text"}, "a" * 5000),
]


def mutated(value: Any, rng: random.Random) -> Any:
    """A value with one or two parts replaced, dropped, doubled or added."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    key, part = rng.choice(items)
    match rng.randrange(4):
        case 0:
            kept = [(k, v) for k, v in items if k != key]
        case 1:
            kept = [*items, (rng.choice(["prompt", "question", "model", "extra", "min_p_correct"]), rng.choice(ODD))]
        case _:
            kept = [(k, mutated(part, rng) if k == key else v) for k, v in items]
    return dict(kept) if isinstance(value, dict) else [v for _, v in kept]


def damaged(body: bytes, rng: random.Random) -> bytes:
    """The body with bytes cut, changed or repeated."""
    place = rng.randrange(len(body))
    return rng.choice(
        [body[:place], body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :], body + body[place:]]
    )
