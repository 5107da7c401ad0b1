"""`train`: activations and outcomes to a router. Probe, project, fit SharedTrunkNet on Ray Train, write the artifact.

Only prompts of the train and validation parts are ever read here; those of the test part stay unseen for `evaluate`.
"""

# N prompts, T targets, F features

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from prefill_jobs import cluster
from prefill_jobs.fit import FitTask, fit_on_ray
from prefill_jobs.graded import GradedStore
from prefill_jobs.predict import predict_store
from prefill_jobs.probe import column_moments, probe_store
from prefill_router import probe, storage
from prefill_router.config import TrainConfig
from prefill_router.console import say
from prefill_router.errors import UserError
from prefill_router.length import LengthHead, LengthScale, mean_factor
from prefill_router.metrics import best_tolerance
from prefill_router.projection import fit_projection
from prefill_router.router import MANIFEST, Router
from prefill_router.split import Part, Split, prompt_hashes
from prefill_router.trunk import Recipe

LENGTH_RECIPE = Recipe(num_seeds=2, keep=1, loss="squared_error")


def train(config: TrainConfig) -> Router:
    """Trains a router and writes it to `config.out`, whole."""
    if not config.overwrite and storage.exists(storage.join(config.out, MANIFEST)):
        raise UserError(f"{config.out}: already holds a router: choose another --out, or replace it with --overwrite")
    graded = GradedStore.open(config.activations, config.outcomes, config.pool, ignore_unknown=config.ignore_unknown)
    split = Split(seed=config.seed, test_fraction=config.test_fraction)
    parts = _Parts.of(graded, split)
    cluster.connect()

    training = graded.only(parts.training)
    say(f"train: probe {len(graded.store.columns)} columns on {len(parts.training):,} prompts")
    chosen = probe.choose_columns(probe_store(training))
    moments = column_moments(training, sorted(set(chosen.values())))
    projections = [fit_projection(column, moments[column]) for column in sorted(moments)]

    task = FitTask(
        graded=graded.only(parts.seen),
        split=split,
        projections=projections,
        length_scale=LengthScale.of(training.outcomes.output_tokens),
        recipe=Recipe(num_seeds=config.seeds, keep=min(config.keep, config.seeds), max_epochs=config.max_epochs),
        length_recipe=LENGTH_RECIPE if parts.have_lengths(graded) else None,
        seed=config.seed,
    )
    num_features, names = sum(p.num_features for p in projections), ", ".join(p.column.name for p in projections)
    say(f"train: fit {config.seeds} trunks on {num_features} features of {names}")
    fitted = fit_on_ray(task, config.workers, config.out)
    router = Router(
        encoder_identity=graded.store.manifest.encoder,
        pool=graded.pool,
        projections=projections,
        trunk=fitted.trunk,
        length=LengthHead(fitted.length, task.length_scale, np.ones(len(chosen), np.float32)),
        default_tolerance=0.0,
        training_prompts=np.sort(prompt_hashes(parts.seen.to_pylist())),
        training={
            "recipe": "published",
            "activations": config.activations,
            "columns": {target: column.name for target, column in chosen.items()},
            "num_train": len(parts.training),
            "num_validation": len(parts.validation),
            "split": split.model_dump(),
            "metrics": {name: fitted.metrics[name] for name in ("validation_losses", "best_epochs", "num_epochs")},
        },
    )
    router = _tuned(router, graded.only(parts.validation))
    router.save(config.out)
    return router


@dataclass(frozen=True)
class _Parts:
    """The graded prompts of a store that training may see."""

    training: pa.Array
    validation: pa.Array

    @property
    def seen(self) -> pa.Array:
        return pa.concat_arrays([self.training, self.validation])

    def have_lengths(self, graded: GradedStore) -> bool:
        """Is the length of any answer known in both parts?"""
        known = (~np.isnan(graded.only(ids).outcomes.output_tokens) for ids in (self.training, self.validation))
        return all(mask.any() for mask in known)

    @classmethod
    def of(cls, graded: GradedStore, split: Split) -> _Parts:
        ids = graded.graded_ids
        parts = split.parts(ids.to_pylist())
        found = cls(*(ids.filter(pa.array(parts == part)) for part in (Part.TRAIN, Part.VALIDATION)))
        if len(found.training) < 2 or not len(found.validation):
            raise UserError(
                f"{len(ids)} graded prompts leave {len(found.training)} to train on and {len(found.validation)} to "
                "validate: grade more prompts, or lower --test-fraction"
            )
        return found


def _tuned(router: Router, validation: GradedStore) -> Router:
    """The router with its lengths unbiased and its tolerance chosen, both on the validation prompts."""
    predicted = predict_store(router, validation.store)
    outcomes = validation.outcomes.align(predicted.prompt_ids)
    factor = mean_factor(outcomes.output_tokens, predicted.expected_output_tokens)
    router = replace(router, length=replace(router.length, factor=factor))
    expected = router.length(predicted.features)
    lengths = np.where(np.isnan(outcomes.output_tokens), expected, outcomes.output_tokens)
    tolerance = best_tolerance(
        outcomes.correct,
        predicted.p_correct,
        router.pool.expected_cost(predicted.num_tokens, expected),
        router.pool.expected_cost(predicted.num_tokens, lengths),
    )
    return replace(router, default_tolerance=tolerance)
