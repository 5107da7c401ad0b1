"""Chooses a target for each prompt: the cheapest one whose P(correct) is close enough to the best.

`pool` has targets, prices and upstreams, `selection` the rule on arrays, `decision` applies it to single prompts, and
`key_variables` and `request_settings` check what a pool may send to an upstream. Start with `selection`.
"""

from prefill_router.policy.selection import (
    NO_TARGET,
    OUT_OF_DISTRIBUTION_SHARE,
    choose,
)

__all__ = [
    "NO_TARGET",
    "OUT_OF_DISTRIBUTION_SHARE",
    "choose",
]
