"""Layer probes: measure which layer's activations separate correct from wrong answers, without training.

`moments` collects mergeable sums, `layer_scores` turns them into Fisher J and d_eff and picks the layers, and
`projection` fits the standardisation and PCA of a picked layer. Start with `layer_scores`.
"""

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
