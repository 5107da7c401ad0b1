"""What a router has to beat on the same prompts: each an object with scikit-learn's `fit` and `predict_proba`.

`fit(x, correct)` takes features (N, F) of the prompts and outcomes (N, T) with NaN where missing; `predict_proba(x)`
gives P(correct) (N, T), which the policy routes by as it does by a router's. What `x` is, the class says as `reads`.
All can be served: see `baselines.router`.
"""

from prefill_router.baselines.base import Baseline, Reads
from prefill_router.baselines.blind import Always, Mixture, Random
from prefill_router.baselines.linear import Logistic, MatrixFactorisation, PromptLength
from prefill_router.baselines.neighbours import Clusters, NearestNeighbours, knn_p_correct
from prefill_router.baselines.net import EmbeddingNet

# By the name in reports and artifacts.
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
