"""The reward from which an answer counts as right, which training, evaluation and comparison must share."""

from __future__ import annotations

from collections.abc import Mapping

from prefill_router.common.errors import UserError
from prefill_router.router.artifact import Router


def shared_threshold(routers: Mapping[str, Router], given: float | None) -> float | None:
    """The reward from which answers counted as right in the training of `routers`, by URI; None without one.

    Raises UserError if it is not the same for all, or not the value `given` by the user.
    """
    (first, router), *others = routers.items()
    for uri, other in others:
        if other.correct_at != router.correct_at:
            raise UserError(
                f"{uri}: trained {_flag(other.correct_at)}, but {first} {_flag(router.correct_at)}: train both alike, "
                "or in a pipeline, publish without a comparison with --accept"
            )
    if given is not None and given != router.correct_at:
        raise UserError(
            f"{first}: trained {_flag(router.correct_at)}, but --correct-at is {given:g}: leave it out, or train with "
            "it"
        )
    return router.correct_at


def _flag(correct_at: float | None) -> str:
    return "without --correct-at" if correct_at is None else f"with --correct-at {correct_at:g}"
