"""Which target a prompt goes to: pools and prices, and the cheapest target that is good enough."""

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
