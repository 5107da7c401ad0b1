"""The summary of a router: its encoder and predictors, its training data and its validation scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefill_router.common.money import usd
from prefill_router.evaluation.results import quality
from prefill_router.metrics import ENOUGH_VALIDATION
from prefill_router.reports.number_format import exactly
from prefill_router.router.artifact import Router

Rows = list[tuple[str, ...]]


def card(router: Router) -> tuple[Rows, Rows]:
    """Rows of (label, text), and a table of the targets whose first row is the header."""
    return list(_about(router)), _targets(router)


def _about(router: Router) -> Iterator[tuple[str, ...]]:
    training, net = router.training, router.trunk
    yield "router", f"{router.version}, format {router.format}"
    if "extends" in training:
        yield "extends", str(training["extends"])
    for name, identity in router.encoders.items():
        yield "encoder", f"{identity.spec.model}, {identity.spec.dtype}, fingerprint {identity.fingerprint}"
        own = [p for p in router.projections if p.column.encoder == name]
        names = ", ".join(f"{p.column.unnamed.name} ({p.num_features} features)" for p in own)
        yield "activations", f"{names} of {identity.num_layers} layers"
    sizes = [net.weights[0].shape[1], *(weight.shape[2] for weight in net.weights)]
    yield "trunk", f"{len(net.weights[0])} nets of {' -> '.join(map(str, sizes))}"
    if len(router.kernel.landmarks):
        yield "kernel", f"{len(router.kernel.landmarks):,} prompts, weight {router.kernel_weight} in P(correct)"
    if per_answer := [f"{t.name} {usd(t.usd_per_answer)}" for t in router.pool.targets if t.usd_per_answer]:
        yield "per answer", ", ".join(per_answer)
    if sources := [f"{name} {source}" for name, source in router.pool.price_sources.items()]:
        yield "prices", ", ".join(sources)
    if tiers := [f"{t.name} {tier.above:,}" for t in router.pool.targets for tier in t.tiers]:
        yield "long inputs", f"other prices above: {', '.join(tiers)} tokens"
    if "num_train" in training:
        yield "training", f"recipe {training.get('recipe')}, {training['num_train']:,} prompts"
        num_validation = training.get("num_validation", 0)
        few = f": fewer than {ENOUGH_VALIDATION}, so that these are mostly noise"
        few = few if num_validation < ENOUGH_VALIDATION else ""
        yield (
            "validation",
            f"{num_validation:,} prompts, which the figures below are of; evaluate has held-out ones{few}",
        )
    yield "held out", router.split.describe()
    if router.correct_at is not None:
        yield "right from", f"a reward of {router.correct_at:g}"
    yield "tolerance", exactly(router.default_tolerance)
    if validation := training.get("validation"):
        yield from _scores(validation)


def _scores(validation: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The validation scores at the router's default tolerance."""
    accuracy, best, oracle = (validation[f"{name}accuracy"] for name in ("", "best_single_", "oracle_"))
    yield (
        quality(is_judged=validation.get("is_judged", False)),
        f"{accuracy:.1%} (best single target {best:.1%}, oracle {oracle:.1%})",
    )
    cost, best_cost = validation["cost"], validation["best_single_cost"]
    yield "cost", f"{usd(1000 * cost)} per 1,000 prompts (best single target {usd(1000 * best_cost)})"
    if share := validation.get("billed_share"):
        yield "billed", f"{share:.1%} of the costs"


def _targets(router: Router) -> Rows:
    training = router.training
    head = ("target", "input per M", "output per M", "answers", "AUC", "calibration", "best layer")
    auc = training.get("validation", {}).get("auc", {})
    rows = [
        (
            target.name,
            usd(target.input_price),
            usd(target.output_price),
            _number(training.get("num_answers", {}).get(target.name), ","),
            _number(auc.get(target.name), ".3f"),
            kind,
            training.get("columns", {}).get(target.name, "-"),
        )
        for target, kind in zip(router.pool.targets, router.calibration.kinds, strict=True)
    ]
    return [head, *rows]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
