"""Which prompts a router may be judged on: those that it was not trained on, under any id."""

# N prompts

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import Keys
from prefill_router.corpus.split_groups import SplitGroups
from prefill_router.router.artifact import Router


def held_out(routers: Sequence[Router], keys: Keys, groups: SplitGroups, *, drop: bool) -> NDArray[np.bool_]:
    """Which of the prompts (N,), by their hashes, none of `routers` was trained on.

    Raises UserError if one of them shares its split group with a training prompt, unless `drop` leaves it out.
    """
    own = groups.of(keys)
    is_seen = np.isin(keys, np.concatenate([router.training_prompts for router in routers]))
    trained = [router.training_units for router in routers if router.split.units == groups.kind]
    leaks = ~is_seen & np.isin(own, np.concatenate([own[is_seen], *trained]))
    if leaks.any():
        told = f"{int(leaks.sum()):,} held-out prompts repeat prompts that the router was trained on"
        if not drop:
            raise UserError(
                f"{told}: their figures would flatter it. Train with --corpus, which keeps them on one side, or leave "
                "them out with --drop-leaked"
            )
        say(f"{told}: they are left out")
    return np.asarray(~is_seen & ~leaks)
