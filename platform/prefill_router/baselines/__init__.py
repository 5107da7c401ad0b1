"""Baseline predictors that a router is compared with, and `BaselineRouter`, which serves one of them.

Start with `Baseline` in `base`. `fit(x, correct)` takes prompt features (N, F) and outcomes (N, T) with NaN where
missing; `predict_proba(x)` returns P(correct) (N, T), which the policy uses as it does a router's. `reads` names the
features that a class expects.
"""

from prefill_router.baselines.base import Baseline, Reads
from prefill_router.baselines.blind import Always, Mixture, Random
from prefill_router.baselines.linear import Logistic, MatrixFactorisation, PromptLength
from prefill_router.baselines.neighbours import Clusters, NearestNeighbours, knn_p_correct
from prefill_router.baselines.net import EmbeddingNet

# Keys are the names in reports and artifacts.
BASELINES: dict[str, type[Baseline]] = {
    "always": Always,
    "random": Random,
    "mixture": Mixture,
    "length": PromptLength,
    "kmeans": Clusters,
    "knn": NearestNeighbours,
    "logistic": Logistic,
    "factorisation": MatrixFactorisation,
    "mlp": EmbeddingNet,
}

__all__ = [
    "BASELINES",
    "Always",
    "Baseline",
    "Clusters",
    "EmbeddingNet",
    "Logistic",
    "MatrixFactorisation",
    "Mixture",
    "NearestNeighbours",
    "PromptLength",
    "Random",
    "Reads",
    "knn_p_correct",
]
