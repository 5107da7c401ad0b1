"""Chooses a target for each prompt: the cheapest one whose P(correct) is close enough to the best.

`pool` has targets, prices and upstreams, `selection` the rule on arrays, and `decision` applies it to single prompts.
Start with `selection`.
"""

from prefill_router.policy.selection import (
    NO_TARGET,
    STRANGER,
    choose,
)

__all__ = [
    "NO_TARGET",
    "STRANGER",
    "choose",
]
