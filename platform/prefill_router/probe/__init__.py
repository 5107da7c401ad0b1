"""Which layer tells right answers from wrong ones: moments, Fisher J, projections."""

from prefill_router.probe.layer_scores import (
    CONFIDENCE,
    DEPTH_TOLERANCE,
    NUM_RESAMPLES,
    SHRINKAGE,
    Fisher,
    LayerProbe,
    by_encoder,
    choose,
    choose_columns,
    coverage,
    d_eff,
    effective_dimensionality,
    fisher,
    fisher_separability,
    joint_columns,
    probe_column,
)

__all__ = [
    "CONFIDENCE",
    "DEPTH_TOLERANCE",
    "NUM_RESAMPLES",
    "SHRINKAGE",
    "Fisher",
    "LayerProbe",
    "by_encoder",
    "choose",
    "choose_columns",
    "coverage",
    "d_eff",
    "effective_dimensionality",
    "fisher",
    "fisher_separability",
    "joint_columns",
    "probe_column",
]
