"""`train --extend`: adds targets to an existing router, drops or reprices them, as the pool file says.

Predictions for the existing targets do not change: trunk and kernel machine are frozen, and a new target is one more
output. Without new targets nothing is trained, and no data is read.
"""

# N prompts, M new targets

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.predictions import GradedPrediction, predict_graded
from prefill_jobs.graded.prompt_split import split_groups_of, split_of
from prefill_jobs.graded.reward_threshold import shared_threshold
from prefill_jobs.options import TrainConfig
from prefill_jobs.runtime import cluster
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import Part
from prefill_router.policy.pool import Pool, Target, load_pool
from prefill_router.predictor.answer_length import mean_scale, spread
from prefill_router.predictor.extension import combined, extended
from prefill_router.predictor.kernel_ridge import KernelMachine
from prefill_router.router.artifact import Router

MIN_OUTCOMES = 50  # per new target, on prompts that are not held out


def extend(config: TrainConfig) -> Router:
    """Returns the router at `config.extend` adapted to the pool at `config.pool`."""
    assert config.extend is not None
    router, pool = Router.load(config.extend), load_pool(config.pool)
    shared_threshold({config.extend: router}, config.correct_at)
    known = set(router.pool.target_names)
    new = [target for target in pool.targets if target.name not in known]
    dropped = sorted(known - set(pool.target_names))
    say(f"train: extend {router.version}: add {_names(t.name for t in new)}; drop {_names(dropped)}")
    training = {**router.training, "extends": router.version, "run": None}
    if new:
        router, num_answers = _with_targets(router, new, config)
        training["num_answers"] = {**training.get("num_answers", {}), **num_answers}
    return replace(router.with_pool(pool), training=training)


def _with_targets(router: Router, new: Sequence[Target], config: TrainConfig) -> tuple[Router, dict[str, int]]:
    """Returns the router with `new` targets after its own, and the number of training outcomes of each new target."""
    activations, outcomes = config.data
    pool = Pool(name=router.pool.name, targets=tuple(new))
    wanted = split_of(config, 0)
    if (wanted.units, wanted.held_out) != (router.split.units, router.split.held_out):
        raise UserError(
            f"the router was trained with {router.split.describe()}: give the same --corpus, --likeness and "
            "--hold-out, or held-out prompts would be trained on"
        )
    groups = split_groups_of(config)
    graded = GradedStore.open(
        activations,
        outcomes,
        pool,
        ignore_unknown=config.ignore_unknown,
        groups=groups,
        correct_at=router.correct_at,
    )
    cluster.connect()
    predicted = predict_graded(router, graded.only(router.split, Part.TRAIN, Part.VALIDATION), with_features=True)
    assert predicted.features is not None
    num_answers = dict(zip(graded.pool.target_names, (~np.isnan(predicted.correct)).sum(0).tolist(), strict=True))
    for name, count in num_answers.items():
        if count < MIN_OUTCOMES:
            raise UserError(
                f'{outcomes}: target "{name}" has {count} outcomes on prompts that are not held out; at least '
                f"{MIN_OUTCOMES} are required, and a few hundred are recommended"
            )
    kernel = _extended_kernel(router.kernel, predicted)
    logs = kernel(predicted.features)[:, -len(new) :]
    router = replace(
        router,
        pool=router.pool.model_copy(update={"targets": (*router.pool.targets, *new)}),
        trunk=extended(router.trunk, torch.from_numpy(predicted.features), torch.from_numpy(predicted.correct)),
        kernel=kernel,
        length_spread=np.concatenate([router.length_spread, spread(predicted.output_tokens, logs)]),
        length_scale=np.concatenate([router.length_scale, mean_scale(predicted.output_tokens, logs)]),
        calibration=router.calibration.with_more(len(new)),
        training_prompts=np.union1d(router.training_prompts, predicted.keys),
        training_units=np.union1d(router.training_units, graded.groups.of(predicted.keys)),
    )
    return router, num_answers


def _extended_kernel(machine: KernelMachine, predicted: GradedPrediction) -> KernelMachine:
    """The machine with new targets' outputs after those of the existing ones: all P(correct), then all log lengths."""
    assert predicted.features is not None
    known = len(machine.mean) // 2
    p, logs = machine.of_outputs(range(known)), machine.of_outputs(range(known, 2 * known))
    more_p = combined(p, predicted.features, predicted.correct)
    more_logs = combined(logs, predicted.features, np.log1p(predicted.output_tokens))
    return p.joined(more_p).joined(logs).joined(more_logs)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "no target"
