"""`train`: activations and outcomes to a router. Probe, project, fit SharedTrunkNet on Ray Train, write the artifact.

Only outcomes of the train and validation parts are ever read here; those of the test part stay unseen for `evaluate`.
"""

# N prompts, T targets of the pool, F features

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs import cluster
from prefill_jobs.extend import extend
from prefill_jobs.fit import LENGTH, TRUNK, FitTask, fit_on_ray
from prefill_jobs.graded import GradedStore
from prefill_jobs.predict import predict_graded
from prefill_jobs.probe import column_moments, probe_store
from prefill_router import probe, storage
from prefill_router.calibration import fit_calibration
from prefill_router.config import TrainConfig
from prefill_router.console import say
from prefill_router.errors import UserError
from prefill_router.evaluation import finite
from prefill_router.length import LengthHead, LengthScale, mean_factor
from prefill_router.metrics import best_tolerance, score_routing
from prefill_router.outcomes import target_names
from prefill_router.pool import load_pool
from prefill_router.projection import fit_projection
from prefill_router.recipe import RECIPES, RouterRecipe
from prefill_router.router import MANIFEST, Router
from prefill_router.split import Part, Split
from prefill_router.training import FittedTrunk
from prefill_router.trunk import SharedTrunkNet


def train(config: TrainConfig) -> Router:
    """Trains a router and writes it to `config.out`, whole."""
    if not config.overwrite and storage.exists(storage.join(config.out, MANIFEST)):
        raise UserError(f"{config.out}: already holds a router: choose another --out, or replace it with --overwrite")
    router = _fitted(config) if config.extend is None else extend(config)
    router.save(config.out)
    return router


def _fitted(config: TrainConfig) -> Router:
    activations, outcomes = config.data
    recipe = _recipe(config)
    pool = load_pool(config.pool)
    others = set(target_names(outcomes)) - set(pool.target_names) if recipe.use_other_targets else set()
    graded = GradedStore.open(
        activations,
        outcomes,
        pool,
        ignore_unknown=config.ignore_unknown,
        more_targets=tuple(sorted(others)),
    )
    split = Split(seed=config.seed, test_fraction=config.test_fraction)
    parts = _Parts.of(graded, split)
    cluster.connect()

    training = graded.only(split, Part.TRAIN)
    say(f"train: probe {len(graded.store.columns)} columns on {parts.num_train:,} prompts")
    probes = probe_store(training.of_pool())
    chosen = probe.choose_columns(probes)
    columns = set(chosen.values())
    if recipe.joint_columns is not None:
        columns = set(probe.joint_columns(probes, recipe.joint_columns))
    moments = column_moments(training, sorted(columns))
    projections = [fit_projection(column, moments[column], whiten=recipe.whiten) for column in sorted(moments)]

    lengths = training.answers(graded.keys).output_tokens
    task = FitTask(
        graded=graded.only(split, Part.TRAIN, Part.VALIDATION),
        split=split,
        projections=projections,
        length_scale=LengthScale.of(lengths),
        recipes={TRUNK: recipe.trunk} | ({LENGTH: recipe.length} if parts.have_lengths else {}),
        weights=((parts.num_answers.max() / parts.num_answers) ** recipe.trunk.balance).tolist(),
        seed=config.seed,
    )
    names = ", ".join(p.column.name for p in projections)
    say(f"train: fit {recipe.trunk.num_seeds} trunks on {task.num_features} features of {names}")
    fitted = fit_on_ray(task, config.workers, config.out, _run_name(config, graded))
    trunk = fitted.nets[TRUNK]
    router = Router(
        encoder_identity=graded.store.manifest.encoder,
        pool=pool,
        projections=projections,
        trunk=trunk.net.of_outputs(range(len(pool.targets))),
        length=_length_head(fitted.nets.get(LENGTH), task),
        default_tolerance=0.0,
        split=split,
        training_prompts=np.sort(task.graded.graded_keys),
        training={
            "recipe": config.recipe,
            "activations": activations,
            "outcomes": outcomes,
            "columns": {target: column.name for target, column in chosen.items()},
            "num_train": parts.num_train,
            "num_validation": parts.num_validation,
            "num_answers": dict(zip(pool.target_names, parts.num_answers.astype(int).tolist(), strict=False)),
            "other_targets": sorted(others),
            "metrics": {
                "validation_losses": trunk.validation_losses,
                "best_epochs": trunk.best_epochs,
                "num_epochs": trunk.num_epochs,
                "rows_per_s": fitted.rows_per_s,
            },
        },
    )
    return tuned(router, graded.only(split, Part.VALIDATION), calibrate=recipe.calibrate)


def _recipe(config: TrainConfig) -> RouterRecipe:
    recipe = RECIPES[config.recipe]
    num_seeds = config.seeds or recipe.trunk.num_seeds
    keep = min(config.keep or recipe.trunk.keep, num_seeds)
    max_epochs = config.max_epochs or recipe.trunk.max_epochs
    return replace(
        recipe,
        trunk=replace(recipe.trunk, num_seeds=num_seeds, keep=keep, max_epochs=max_epochs),
        length=replace(recipe.length, max_epochs=min(max_epochs, recipe.length.max_epochs)),
    )


@dataclass(frozen=True)
class _Parts:
    """What the graded prompts of a store leave for training to see."""

    num_train: int
    num_validation: int
    num_answers: NDArray[np.float64]  # (T,) in training
    have_lengths: bool  # is the length of any answer known, in both parts?

    @classmethod
    def of(cls, graded: GradedStore, split: Split) -> _Parts:
        keys = graded.graded_keys
        parts = split.parts(keys)
        train, validation = (graded.outcomes.at(keys[parts == part]) for part in (Part.TRAIN, Part.VALIDATION))
        if len(train.correct) < 2 or not len(validation.correct):
            raise UserError(
                f"{len(keys)} graded prompts leave {len(train.correct)} to train on and {len(validation.correct)} to "
                "validate: grade more prompts, or lower --test-fraction"
            )
        return cls(
            len(train.correct),
            len(validation.correct),
            np.maximum((~np.isnan(train.correct)).sum(0), 1).astype(np.float64),
            all(bool((~np.isnan(answers.output_tokens)).any()) for answers in (train, validation)),
        )


def _run_name(config: TrainConfig, graded: GradedStore) -> str:
    """The same for the same training, so that a run whose driver was killed goes on."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"overwrite"}).encode())
    digest.update(graded.store.manifest.model_dump_json().encode())
    for array in (graded.outcomes.keys, graded.outcomes.correct, graded.outcomes.output_tokens):
        digest.update(np.ascontiguousarray(array).data)
    return f"train-{digest.hexdigest()[:16]}"


def _length_head(fitted: FittedTrunk | None, task: FitTask) -> LengthHead:
    """Of the pool's targets. Where no length is known, the scale alone tells it."""
    num_all = len(task.weights)
    net = SharedTrunkNet([task.num_features, 2 * num_all], num_seeds=1) if fitted is None else fitted.net
    head = LengthHead(net, task.length_scale, np.ones(num_all, np.float32))
    return head.of_targets(range(len(task.graded.pool.targets)))


def tuned(router: Router, validation: GradedStore, *, calibrate: bool) -> Router:
    """The router with its probabilities and lengths unbiased and its tolerance chosen, on the validation prompts.

    How good it is on them is entered in what is told of its training.
    """
    predicted = predict_graded(router, validation)
    factor = mean_factor(predicted.output_tokens, predicted.expected_output_tokens)
    correct, p_correct = predicted.correct, predicted.p_correct
    calibration = router.calibration
    if calibrate:
        calibration = fit_calibration(p_correct, correct)
        p_correct = calibration(p_correct)
    expected_tokens = np.maximum((predicted.expected_output_tokens + 1.0) * factor - 1.0, 1.0)
    tokens = np.where(np.isnan(predicted.output_tokens), expected_tokens, predicted.output_tokens)
    expected, paid = (router.pool.expected_cost(predicted.num_tokens, t) for t in (expected_tokens, tokens))
    tolerance = best_tolerance(correct, p_correct, expected, paid)
    scores: dict[str, Any] = {}
    if not np.isnan(correct).any(1).all():
        scores = asdict(score_routing(correct, p_correct, expected, tolerance, paid))
        scores |= {name: dict(zip(router.pool.target_names, scores[name], strict=True)) for name in ("auc", "brier")}
        del scores["ece"]  # of the prompts that calibration was fitted on
    return replace(
        router,
        length=replace(router.length, factor=factor),
        calibration=calibration,
        default_tolerance=tolerance,
        training={**router.training, "validation": finite(scores)},
    )
