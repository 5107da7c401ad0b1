"""`train`: builds a router from activations and outcomes: probe, project, fit SharedTrunkNet on Ray Train, save.

Only outcomes of the training and validation parts are used; those of the test part are held out for `evaluate`.
"""

# N prompts, T targets of the pool, F features

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.embeddings import fetch_sentence_encoder
from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.predictions import GradedPrediction, predict_graded
from prefill_jobs.graded.prompt_split import split_groups_of, split_of
from prefill_jobs.options import TrainConfig
from prefill_jobs.runtime import cluster
from prefill_jobs.train import sensor_choice
from prefill_jobs.train.extend_job import extend
from prefill_jobs.train.kernel_sample import sample_rows
from prefill_jobs.train.probe_job import column_moments, probe_store
from prefill_jobs.train.sensor_choice import SensorTrial
from prefill_jobs.train.trunk_fit import FitTask, fit_on_ray
from prefill_router import storage
from prefill_router.activations.activation_store import ActivationStore
from prefill_router.activations.encode_time import encode_times
from prefill_router.activations.joined_stores import store_uris
from prefill_router.common.console import doing, say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.split import Part, Split
from prefill_router.encoder.encoder_spec import EncoderIdentity
from prefill_router.encoder.sensors import named
from prefill_router.evaluation.results import finite, thinned
from prefill_router.metrics import Scorer, best_tolerance
from prefill_router.metrics.discrimination import has_partial_credit
from prefill_router.outcomes import check_columns, target_names
from prefill_router.policy.answer_cost import answer_costs, billed_share, check_prices, with_answer_prices
from prefill_router.policy.pool import load_pool
from prefill_router.predictor.answer_length import (
    log_lengths,
    mean_scale,
    mean_tokens,
    median_logs,
    spread,
    without_lengths,
)
from prefill_router.predictor.calibration import fit_calibration
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS, KernelMachine, fit_kernel
from prefill_router.predictor.recipe import RECIPES, RouterRecipe
from prefill_router.predictor.stacking import best_weight, stacked
from prefill_router.probe import layer_scores
from prefill_router.probe.projection import Projection, fit_projection
from prefill_router.router.artifact import MANIFEST, Router

_MOST_FREE = 0.05  # share of answers billed for no more than their prompts, from which prices are likely to be wrong


def train(config: TrainConfig, fold: int = 0, *, keep_learnt: bool = False) -> Router:
    """Trains a router and writes it to `config.out`. With `config.folds`, fold number `fold` is held out.

    With `keep_learnt`, an existing router trained on the same data with the same settings is not trained again: only
    values that depend on prices are chosen anew.
    """
    _check(config)
    before = _router_at(config.out) if keep_learnt else None
    router = _fitted(config, split_of(config, fold), before) if config.extend is None else extend(config)
    router.save(config.out)
    return router


def _router_at(uri: str) -> Router | None:
    """The router at `uri`, or None if there is no readable one."""
    try:
        return Router.load(uri)
    except UserError:
        return None


def train_folds(config: TrainConfig) -> list[Router]:
    """Trains one router per fold below `config.out`, each on all prompts except those of its fold."""
    assert config.folds is not None
    outs = [storage.join(config.out, f"fold-{fold}") for fold in range(config.folds)]
    of_folds = [config.model_copy(update={"out": out}) for out in outs]
    for of_fold in of_folds:
        _check(of_fold)
    routers = []
    for fold, of_fold in enumerate(of_folds):
        say(f"train: fold {fold + 1} of {config.folds}")
        routers.append(train(of_fold, fold))
    return routers


def _check(config: TrainConfig) -> None:
    """Raises UserError for problems that can be found before embedding prompts or reading outcomes."""
    storage.check_output(config.out)
    if not config.overwrite and storage.exists(storage.join(config.out, MANIFEST)):
        raise UserError(f"{config.out}: already has a router: choose another --out, or replace it with --overwrite")
    pool = load_pool(config.pool, prices_optional=config.extend is None)
    if config.activations is not None:
        for uri in store_uris(config.activations):
            ActivationStore.open(uri)
    if config.outcomes is not None:
        check_columns(config.outcomes)
        check_prices(pool, config.outcomes)
    if config.likeness is not None:
        fetch_sentence_encoder(config.sentence_encoder)


def _fitted(config: TrainConfig, split: Split, before: Router | None) -> Router:
    """A router of graded prompts; `before` with other prices if it was trained on the same data."""
    recipe = _recipe(config)
    graded, others = _graded(config, split, recipe)
    validation, parts = graded.only(split, Part.VALIDATION), _Parts.of(graded, split)
    cluster.connect()
    run = _run_name(config, graded, [*graded.pool.target_names, *others])
    if before is not None and before.training.get("run") == run:
        say(f"train: router {before.version} was trained on the same data: only price-dependent values are updated")
        return tuned(before.with_pool(graded.pool), validation, recipe)
    say(f"train: probe {len(graded.store.columns)} columns on {parts.num_train:,} prompts")
    reading = _Reading.chosen(graded, split, recipe, config.max_encode_ms)
    router, learnt = _fit(config, graded.of_encoders(reading.encoders), split, recipe, parts, reading, run)
    training = {
        "recipe": config.recipe,
        "run": run,
        "activations": config.activations,
        "outcomes": config.outcomes,
        **({} if config.correct_at is None else {"correct_at": config.correct_at}),
        "columns": {target: column.name for target, column in reading.columns.items()},
        "num_train": parts.num_train,
        "num_validation": parts.num_validation,
        "num_answers": dict(zip(graded.pool.target_names, parts.num_answers.astype(int).tolist(), strict=False)),
        "other_targets": others,
        **({"sensors": [trial.to_dict() for trial in reading.trials]} if reading.trials else {}),
        "metrics": learnt,
    }
    return tuned(replace(router, training=training), validation.of_encoders(reading.encoders), recipe)


def _graded(config: TrainConfig, split: Split, recipe: RouterRecipe) -> tuple[GradedStore, list[str]]:
    """The graded prompts, with prices that their answers imply, and the targets that only the training reads."""
    activations, outcomes = config.data
    pool = load_pool(config.pool, prices_optional=True)
    others = sorted(set(target_names(outcomes)) - set(pool.target_names)) if recipe.use_other_targets else []
    graded = GradedStore.open(
        activations,
        outcomes,
        pool,
        ignore_unknown=config.ignore_unknown,
        more_targets=tuple(others),
        groups=split_groups_of(config),
        correct_at=config.correct_at,
    )
    seen = graded.only(split, Part.TRAIN, Part.VALIDATION)
    answers = seen.answers(seen.keys)
    if np.isnan(answers.output_tokens).all() and np.isnan(answers.cost_usd).all():
        say(f"train: {without_lengths(outcomes)}")
    return replace(graded, pool=with_answer_prices(pool, answers.cost_usd)), others


def _fit(
    config: TrainConfig,
    graded: GradedStore,
    split: Split,
    recipe: RouterRecipe,
    parts: _Parts,
    reading: _Reading,
    run: str,
) -> tuple[Router, dict[str, Any]]:
    """A router whose tolerance and lengths are not tuned, and the metrics of its trunk."""
    projections, num_targets = reading.projections, len(graded.pool.targets)
    task = FitTask(
        graded=graded.only(split, Part.TRAIN, Part.VALIDATION),
        split=split,
        projections=projections,
        recipe=recipe.trunk,
        weights=((parts.num_answers.max() / parts.num_answers) ** recipe.trunk.balance).tolist(),
        seed=config.seed,
    )
    names = ", ".join(p.column.name for p in projections)
    say(f"train: fit {recipe.trunk.num_seeds} trunks on {task.num_features} features of {names}")
    fitted, seen = fit_on_ray(task, config.workers, config.out, run), task.graded.graded_keys
    router = Router(
        encoders=reading.encoders,
        pool=graded.pool,
        projections=projections,
        trunk=fitted.trunk.net.of_outputs(range(num_targets)),
        kernel=_kernel_machine(graded.only(split, Part.TRAIN), projections, is_fitted=recipe.kernel),
        kernel_weight=0.0,
        length_spread=np.zeros(num_targets, np.float32),
        length_scale=np.ones(num_targets, np.float32),
        default_tolerance=0.0,
        split=split,
        training_prompts=np.sort(seen),
        training_units=np.unique(graded.groups.of(seen)),
    )
    return router, fitted.to_dict()


@dataclass(frozen=True)
class _Reading:
    """What a router reads of its prompts."""

    encoders: dict[str, EncoderIdentity]
    projections: list[Projection]
    columns: dict[str, ActivationColumn]  # each target's best one
    trials: list[SensorTrial]  # of several encoders

    @classmethod
    def chosen(cls, graded: GradedStore, split: Split, recipe: RouterRecipe, max_encode_ms: float | None) -> _Reading:
        """Chooses columns by the probes of the training prompts, and among several encoders as `sensor_choice` does."""
        training, validation = graded.only(split, Part.TRAIN), graded.only(split, Part.VALIDATION)
        probes = probe_store(training.of_pool())
        best = layer_scores.choose_columns(probes)
        is_choice = recipe.columns == "joint" and len(graded.store.encoders) > 1
        options = sensor_choice.options_of(probes, encode_times(graded.store)) if is_choice else []
        joint = [c for option in options for c in option.columns] if options else layer_scores.joint_columns(probes)
        columns = sorted(set(best.values() if recipe.columns == "own" else joint))
        moments = column_moments(training, columns)
        projections = [fit_projection(column, moments[column], whiten=recipe.whiten) for column in columns]
        trials = []
        if options:
            trials = sensor_choice.choose_sensors(training, validation, options, projections, max_encode_ms)
            kept = {column for trial in trials if trial.is_kept for column in trial.option.columns}
            projections = [projection for projection in projections if projection.column in kept]
        return cls(*_renamed(graded.store.encoders, projections), best, trials)


def _renamed(
    encoders: Mapping[str, EncoderIdentity], projections: Sequence[Projection]
) -> tuple[dict[str, EncoderIdentity], list[Projection]]:
    """The encoders that projections read, and the projections, under the names that a router of these has."""
    read = {p.column.encoder for p in projections}
    before = [name for name in encoders if name in read]
    by_name = named(encoders[name] for name in before)
    names = dict(zip(before, by_name, strict=True))
    return by_name, sorted(
        (replace(p, column=p.column.of(names[p.column.encoder])) for p in projections), key=lambda p: p.column
    )


def _recipe(config: TrainConfig) -> RouterRecipe:
    recipe = RECIPES[config.recipe]
    num_seeds = config.seeds or recipe.trunk.num_seeds
    keep = min(config.keep or recipe.trunk.keep, num_seeds)
    max_epochs = config.max_epochs or recipe.trunk.max_epochs
    return replace(
        recipe,
        trunk=replace(recipe.trunk, num_seeds=num_seeds, keep=keep, max_epochs=max_epochs, precision=config.precision),
    )


@dataclass(frozen=True)
class _Parts:
    """Sizes of the training and validation parts of a store's graded prompts."""

    num_train: int
    num_validation: int
    num_answers: NDArray[np.float64]  # (T,) outcomes in the training part

    @classmethod
    def of(cls, graded: GradedStore, split: Split) -> _Parts:
        keys = graded.graded_keys
        parts = graded.parts(keys, split)
        train, validation = (graded.outcomes.at(keys[parts == part]) for part in (Part.TRAIN, Part.VALIDATION))
        if len(train.correct) < 2 or not len(validation.correct):
            raise UserError(
                f"{len(keys)} graded prompts leave {len(train.correct)} for training and {len(validation.correct)} for "
                "validation: grade more prompts, or lower --test-fraction"
            )
        return cls(
            len(train.correct),
            len(validation.correct),
            np.maximum((~np.isnan(train.correct)).sum(0), 1).astype(np.float64),
        )


def _run_name(config: TrainConfig, graded: GradedStore, targets: list[str]) -> str:
    """A name that identifies the training apart from prices, so that a run whose driver was killed is resumed."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"overwrite"}).encode())
    digest.update(json.dumps(targets).encode())
    digest.update(graded.store.content.encode())
    outcomes = graded.outcomes
    for array in (outcomes.keys, outcomes.correct, outcomes.output_tokens):
        digest.update(np.ascontiguousarray(array).data)
    implying = outcomes.cost_usd[np.isnan(outcomes.output_tokens) & ~np.isnan(outcomes.cost_usd)]
    if len(implying):  # lengths that are implied by billed costs depend on prices
        digest.update(implying.data)
        digest.update(json.dumps(graded.pool.prices).encode())
    return f"train-{digest.hexdigest()[:16]}"


def _kernel_machine(training: GradedStore, projections: list[Projection], *, is_fitted: bool) -> KernelMachine:
    """Fits the machine that predicts P(correct), then log lengths, of the pool's targets.

    Unless `is_fitted`, it is a constant that predicts the median lengths.
    """
    num_targets = len(training.pool.targets)
    num_features = sum(projection.num_features for projection in projections)
    if not is_fitted:
        medians = median_logs(sample_rows(training.of_pool(), [], len(training.keys)).output_tokens)
        return KernelMachine.constant(np.concatenate([np.zeros_like(medians), medians]), num_features)
    rows = sample_rows(training, projections, MAX_LANDMARKS)
    say(f"train: fit a kernel machine to {len(rows.keys):,} prompts")
    machine = fit_kernel(rows.features, [rows.correct, log_lengths(rows.output_tokens)])
    num_all = rows.correct.shape[1]
    return machine.of_outputs([*range(num_targets), *range(num_all, num_all + num_targets)])


def _report_free(predicted: GradedPrediction) -> None:
    """Reports billed costs that leave nothing for the answer, so that its implied length is 0.

    A few are expected: providers count tokens differently from the encoder.
    """
    is_billed = ~np.isnan(predicted.cost_usd)
    num_free = int(((predicted.output_tokens == 0.0) & is_billed).sum())
    if num_free > _MOST_FREE * is_billed.sum():
        say(
            f"train: {num_free:,} of {is_billed.sum():,} validation answers were billed for no more than their prompts "
            "at the pool's prices: their lengths count as 0; check the prices"
        )


def _of_every_target(correct: NDArray[np.float32], p_correct: NDArray[np.float32]) -> NDArray[np.float32]:
    """The outcomes (N, T); if most prompts lack one of some target, as in feedback, P(correct) stands in for these."""
    is_partial = np.isnan(correct).any(1).mean() > 0.5
    return np.where(np.isnan(correct), p_correct, correct) if is_partial else correct


@doing("choosing calibration and tolerance")
def tuned(router: Router, validation: GradedStore, recipe: RouterRecipe) -> Router:
    """The router with the values chosen on validation prompts: the kernel machine's weight, calibration and tolerance.

    Its validation scores are added to `training`.
    """
    predicted = predict_graded(router, validation)
    correct, estimates = predicted.correct, predicted.estimates
    weight = best_weight(estimates.p_trunk, estimates.p_kernel, correct) if recipe.kernel else 0.0
    p_correct = stacked(estimates.p_trunk, estimates.p_kernel, weight)
    calibration = router.calibration
    if recipe.calibrate:
        calibration = fit_calibration(p_correct, correct)
        p_correct = calibration(p_correct)
    scale = mean_scale(predicted.output_tokens, estimates.log_lengths)
    expected_tokens = mean_tokens(estimates.log_lengths, scale)
    _report_free(predicted)
    expected = router.pool.expected_cost(predicted.num_tokens, expected_tokens)
    paid = answer_costs(router.pool, predicted.num_tokens, predicted.output_tokens, predicted.cost_usd, expected_tokens)
    tolerance = best_tolerance(_of_every_target(correct, p_correct), p_correct, expected, paid)
    scores: dict[str, Any] = {}
    if not np.isnan(correct).any(1).all():
        scorer = Scorer(correct, p_correct, expected, tolerance, paid)
        scores = asdict(scorer.scores())
        scores |= {name: dict(zip(router.pool.target_names, scores[name], strict=True)) for name in ("auc", "brier")}
        scores["is_judged"] = has_partial_credit(correct)
        scores["billed_share"] = billed_share(correct, predicted.cost_usd)
        del scores["ece"]  # meaningless on the prompts that calibration was fitted on
        scores["curve"] = thinned(scorer.curve()).tolist()  # tolerance, cost, accuracy
        singles = np.concatenate(scorer.singles(np.ones((1, len(correct)), int))).T
        scores["singles"] = dict(zip(router.pool.target_names, singles.tolist(), strict=True))  # cost, accuracy
    return replace(
        router,
        kernel_weight=weight,
        length_spread=spread(predicted.output_tokens, estimates.log_lengths),
        length_scale=scale,
        calibration=calibration,
        default_tolerance=tolerance,
        training={**router.training, "validation": finite(scores)},
    )
