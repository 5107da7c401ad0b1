"""Finds held-out prompts: those that no router was trained on, under any id."""

# N prompts

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import PromptHashes
from prefill_router.corpus.split_groups import SplitGroups
from prefill_router.router.artifact import Router


def held_out(routers: Sequence[Router], keys: PromptHashes, groups: SplitGroups, *, drop: bool) -> NDArray[np.bool_]:
    """Whether each prompt (N,), given its hash, is held out from all `routers`.

    Raises UserError if a held-out prompt shares its split group with a training prompt, unless `drop` excludes these.
    """
    own = groups.of(keys)
    is_seen = np.isin(keys, np.concatenate([router.training_prompts for router in routers]))
    trained = [router.training_units for router in routers if router.split.units == groups.kind]
    leaks = ~is_seen & np.isin(own, np.concatenate([own[is_seen], *trained]))
    if leaks.any():
        found = f"{int(leaks.sum()):,} held-out prompts repeat prompts that the router was trained on"
        if not drop:
            raise UserError(
                f"{found}, which inflates its scores: train with --corpus to keep repeats on one side of the split, or "
                "exclude them with --drop-leaked"
            )
        say(f"{found}: they are excluded")
    return np.asarray(~is_seen & ~leaks)
