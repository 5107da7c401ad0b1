"""`train --extend`: an existing router with targets added, dropped or repriced, as the pool's file says.

What the router says of the targets that it knew stays as it is: trunk and lengths are frozen, and a new target is an
output more. Without new targets nothing is learnt, and no data is read.
"""

# N prompts, M new targets

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from prefill_jobs import cluster
from prefill_jobs.graded import GradedStore
from prefill_jobs.predict import predict_graded
from prefill_router.config import TrainConfig
from prefill_router.console import say
from prefill_router.errors import UserError
from prefill_router.extension import extended
from prefill_router.length import LengthHead, LengthScale, mean_factor
from prefill_router.pool import Pool, Target, load_pool
from prefill_router.router import Router
from prefill_router.split import Part

MIN_OUTCOMES = 50  # of a new target, on prompts that are not held out


def extend(config: TrainConfig) -> Router:
    """The router at `config.extend`, for the pool at `config.pool`."""
    assert config.extend is not None
    router, pool = Router.load(config.extend), load_pool(config.pool)
    known = set(router.pool.target_names)
    new = [target for target in pool.targets if target.name not in known]
    dropped = sorted(known - set(pool.target_names))
    say(f"train: extend {router.version} by {_names(t.name for t in new)}; drop {_names(dropped)}")
    training = {**router.training, "extends": router.version}
    if new:
        router, num_answers = _learnt(router, new, config)
        training["num_answers"] = {**training.get("num_answers", {}), **num_answers}
    return replace(router.with_pool(pool), training=training)


def _learnt(router: Router, new: Sequence[Target], config: TrainConfig) -> tuple[Router, dict[str, int]]:
    """The router with `new` targets after its own, and how many answers taught each."""
    activations, outcomes = config.data
    pool = Pool(name=router.pool.name, targets=tuple(new))
    graded = GradedStore.open(activations, outcomes, pool, ignore_unknown=config.ignore_unknown)
    cluster.connect()
    predicted = predict_graded(router, graded.only(router.split, Part.TRAIN, Part.VALIDATION), with_features=True)
    assert predicted.features is not None
    num_answers = dict(zip(graded.pool.target_names, (~np.isnan(predicted.correct)).sum(0).tolist(), strict=True))
    for name, count in num_answers.items():
        if count < MIN_OUTCOMES:
            raise UserError(
                f'{outcomes}: target "{name}" has {count} outcomes on prompts that are not held out; at least '
                f"{MIN_OUTCOMES} are wanted, and a few hundred are better"
            )
    features = torch.from_numpy(predicted.features)
    router = replace(
        router,
        pool=router.pool.model_copy(update={"targets": (*router.pool.targets, *new)}),
        trunk=extended(router.trunk, features, torch.from_numpy(predicted.correct), "cross_entropy"),
        length=_extended_length(router.length, predicted.features, predicted.output_tokens),
        calibration=router.calibration.with_more(len(new)),
        training_prompts=np.union1d(router.training_prompts, predicted.keys),
    )
    return router, num_answers


def _extended_length(head: LengthHead, features: NDArray[np.float32], output_tokens: NDArray[np.float32]) -> LengthHead:
    """The head with further targets. One whose lengths are unknown has those that all others have on the mean."""
    new = LengthScale.of(output_tokens)
    labels = new.standardised(output_tokens)
    net = extended(head.net, torch.from_numpy(features), torch.from_numpy(labels), "log_normal")
    scale = LengthScale(*(np.concatenate(parts) for parts in zip(head.scale, new, strict=True)))
    unbiased = LengthHead(net, scale, np.ones(len(scale.mean), np.float32))
    num_new = labels.shape[1]
    factor = mean_factor(output_tokens, unbiased(features)[:, -num_new:])
    return replace(unbiased, factor=np.concatenate([head.factor, factor]))


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "no target"
