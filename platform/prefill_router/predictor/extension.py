"""Adds targets to a trained router from a few hundred outcomes each; everything already trained stays frozen.

A new output of the trunk is a logistic ridge regression on each seed's last hidden layer. A new output of a kernel
machine is a ridge regression on its known outputs. Both shrink towards the mean of the known targets, which measures
how hard a prompt is, instead of towards zero. Cross-validation picks the strength.
"""

# K seeds, N prompts, T known targets, M new ones, H hidden units, P = H + 1 with the bias

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefill_router.predictor.kernel_ridge import KernelMachine
from prefill_router.predictor.trunk import SharedTrunkNet

Loss = Literal["cross_entropy", "square"]

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_FOLDS = 5
_NEWTON_STEPS = 12
_EPSILON = 1e-6


def extended(net: SharedTrunkNet, features: Tensor, labels: Tensor) -> SharedTrunkNet:
    """Adds M targets to `net`, fitted to features (N, F) and outcomes (N, M), NaN where missing."""
    heads = torch.cat([net.weights[-1], net.biases[-1]], dim=1).double()  # (K, P, outputs)
    hidden = net.hidden(features).double()
    x_KNP = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=2)
    new = _fit_heads(x_KNP, labels.double(), heads.mean(2), "cross_entropy")
    return _with_heads(net, torch.cat([heads, new], dim=2))


def combined(machine: KernelMachine, features: NDArray[np.float32], labels: NDArray[np.float32]) -> KernelMachine:
    """Returns a machine with M new outputs only, each a combination of the T of `machine`, fitted to labels (N, M)."""
    num_known = len(machine.mean)
    outputs = torch.from_numpy(machine(features) - machine.mean).double()[None]
    x_KNP = torch.cat([outputs, torch.ones_like(outputs[..., :1])], dim=2)
    prior = torch.tensor([[*[1.0 / num_known] * num_known, float(machine.mean.mean())]], dtype=torch.float64)
    weights = _fit_heads(x_KNP, torch.from_numpy(labels).double(), prior, "square")[0].float().numpy()
    return KernelMachine(machine.landmarks, machine.lengthscale, machine.coefficients @ weights[:-1], weights[-1])


def _fit_heads(x_KNP: Tensor, labels: Tensor, prior: Tensor, loss: Loss) -> Tensor:
    """Fits heads (K, P, M); a target without labels gets the prior."""
    heads = []
    for labels_N in labels.T:
        known = ~labels_N.isnan()
        x, y = x_KNP[:, known], labels_N[known]
        heads.append(_fit_head(x, y, prior, _best_strength(x, y, prior, loss), loss) if len(y) else prior)
    return torch.stack(heads, dim=2)


def _with_heads(net: SharedTrunkNet, heads_KPO: Tensor) -> SharedTrunkNet:
    last = len(net.weights) - 1
    weights, biases = heads_KPO[:, :-1].float().contiguous(), heads_KPO[:, -1:].float().contiguous()
    state = {**net.state_dict(), f"weights.{last}": weights, f"biases.{last}": biases}
    return SharedTrunkNet.from_state(state)


def _best_strength(x_KNP: Tensor, y: Tensor, prior: Tensor, loss: Loss) -> float:
    """Returns the strength with the lowest cross-validated loss; a tie goes to the stronger one."""
    fold = torch.arange(len(y)) % _FOLDS
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for k in range(_FOLDS):
            seen = fold != k
            head = _fit_head(x_KNP[:, seen], y[seen], prior, strength, loss)
            outputs = torch.einsum("knp,kp->kn", x_KNP[:, ~seen], head)
            total += float(_loss(outputs, y[~seen], loss))
        losses.append(total)
    return min(zip(losses, STRENGTHS, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]


def _loss(outputs_KN: Tensor, y: Tensor, loss: Loss) -> Tensor:
    if loss == "square":
        return (outputs_KN.mean(0) - y).square().sum()
    p = torch.sigmoid(outputs_KN).mean(0).clamp(_EPSILON, 1.0 - _EPSILON)
    return torch.nn.functional.binary_cross_entropy(p, y, reduction="sum")


def _fit_head(x_KNP: Tensor, y: Tensor, prior: Tensor, strength: float, loss: Loss) -> Tensor:
    """Minimises the loss of a head (K, P) plus `strength` / 2 |head - prior|^2, with inputs at unit variance."""
    penalty = strength * x_KNP.var(dim=1, correction=0)
    penalty[:, -1] = 0.0  # no penalty on the bias
    penalty = penalty + _EPSILON
    head = prior.clone()
    for _ in range(_NEWTON_STEPS if loss == "cross_entropy" else 1):
        outputs = torch.einsum("knp,kp->kn", x_KNP, head)
        p = torch.sigmoid(outputs) if loss == "cross_entropy" else outputs
        curvature = p * (1.0 - p) if loss == "cross_entropy" else torch.ones_like(p)
        gradient = torch.einsum("knp,kn->kp", x_KNP, p - y) + penalty * (head - prior)
        hessian = torch.einsum("knp,kn,knq->kpq", x_KNP, curvature, x_KNP) + torch.diag_embed(penalty)
        head = head - torch.linalg.solve(hessian, gradient)
    return head
