"""New targets for a trained net, from a few hundred outcomes each: more outputs on the frozen trunk.

An output is a ridge regression, logistic for outcomes, on the last hidden layer of each seed. It is drawn not to zero
but to the mean of the outputs that the net already has, which is what all targets share: how hard a prompt is. How
strongly is cross-validated. The other outputs stay as they are.
"""

# K seeds, N prompts, M new targets, H hidden units, P = H + 1 with the bias

from __future__ import annotations

import torch
from torch import Tensor

from prefill_router.recipe import Loss
from prefill_router.trunk import SharedTrunkNet

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_FOLDS = 5
_STEPS = 12  # of Newton's method
_EPSILON = 1e-6


def extended(net: SharedTrunkNet, features: Tensor, labels: Tensor, loss: Loss) -> SharedTrunkNet:
    """`net` with M more targets, learnt from features (N, F) and labels (N, M), NaN where missing.

    For "log_normal" outputs, the new spread is that of what the mean leaves, for every prompt.
    """
    heads = torch.cat([net.weights[-1], net.biases[-1]], dim=1).double()  # (K, P, outputs)
    means, spreads = (heads, None) if loss == "cross_entropy" else heads.chunk(2, dim=2)
    prior = means.mean(2)
    new_means, new_spreads = [], []
    for labels_N in labels.double().T:
        known = ~labels_N.isnan()
        hidden = net.hidden(features[known]).double()
        x_KNP, y = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=2), labels_N[known]
        mean = _fitted(x_KNP, y, prior, _best_strength(x_KNP, y, prior, loss), loss)
        spread = torch.zeros_like(mean)
        rest = torch.einsum("knp,kp->kn", x_KNP, mean) - y
        spread[:, -1] = rest.square().mean(1).sqrt().clamp(min=_EPSILON).log()
        new_means.append(mean)
        new_spreads.append(spread)
    parts = [means, torch.stack(new_means, dim=2)]
    if spreads is not None:
        parts += [spreads, torch.stack(new_spreads, dim=2)]
    return _with_heads(net, torch.cat(parts, dim=2))


def _with_heads(net: SharedTrunkNet, heads_KPO: Tensor) -> SharedTrunkNet:
    last = len(net.weights) - 1
    weights, biases = heads_KPO[:, :-1].float().contiguous(), heads_KPO[:, -1:].float().contiguous()
    state = {**net.state_dict(), f"weights.{last}": weights, f"biases.{last}": biases}
    return SharedTrunkNet.from_state(state)


def _best_strength(x_KNP: Tensor, y: Tensor, prior: Tensor, loss: Loss) -> float:
    """The one with the lowest loss on prompts left out, the stronger at a tie."""
    fold = torch.arange(len(y)) % _FOLDS
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for k in range(_FOLDS):
            seen = fold != k
            head = _fitted(x_KNP[:, seen], y[seen], prior, strength, loss)
            outputs = torch.einsum("knp,kp->kn", x_KNP[:, ~seen], head)
            total += float(_loss(outputs, y[~seen], loss))
        losses.append(total)
    return min(zip(losses, STRENGTHS, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]


def _loss(outputs_KN: Tensor, y: Tensor, loss: Loss) -> Tensor:
    if loss == "log_normal":
        return (outputs_KN.mean(0) - y).square().sum()
    p = torch.sigmoid(outputs_KN).mean(0).clamp(_EPSILON, 1.0 - _EPSILON)
    return torch.nn.functional.binary_cross_entropy(p, y, reduction="sum")


def _fitted(x_KNP: Tensor, y: Tensor, prior: Tensor, strength: float, loss: Loss) -> Tensor:
    """The head (K, P) of least loss plus `strength` / 2 times its squared distance from `prior`, units standardised."""
    penalty = strength * x_KNP.var(dim=1, correction=0)
    penalty[:, -1] = 0.0  # the bias is free
    penalty = penalty + _EPSILON
    head = prior.clone()
    for _ in range(_STEPS if loss == "cross_entropy" else 1):
        outputs = torch.einsum("knp,kp->kn", x_KNP, head)
        p = torch.sigmoid(outputs) if loss == "cross_entropy" else outputs
        curvature = p * (1.0 - p) if loss == "cross_entropy" else torch.ones_like(p)
        gradient = torch.einsum("knp,kn->kp", x_KNP, p - y) + penalty * (head - prior)
        hessian = torch.einsum("knp,kn,knq->kpq", x_KNP, curvature, x_KNP) + torch.diag_embed(penalty)
        head = head - torch.linalg.solve(hessian, gradient)
    return head
