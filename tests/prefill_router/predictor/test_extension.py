from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prefill_router.metrics import roc_auc
from prefill_router.predictor.extension import combined, extended
from prefill_router.predictor.kernel_ridge import KernelMachine, fit_kernel
from prefill_router.predictor.trunk import SharedTrunkNet

NUM_SEEDS, NUM_FEATURES = 2, 6


def difficulty(features: Tensor) -> Tensor:
    return features[:, 0] + 0.5 * features[:, 1].abs()


def random_features(num_prompts: int, seed: int) -> Tensor:
    return torch.randn(num_prompts, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))


def outcomes(features: Tensor, seed: int, bias: float = 0.0, own: float = 0.0) -> Tensor:
    """Returns outcomes (N,) that depend on the shared difficulty, and on a part specific to the target."""
    chance = torch.sigmoid(-2.0 * difficulty(features) + bias + own * features[:, 2])
    return (torch.rand(len(features), generator=torch.Generator().manual_seed(seed)) < chance).float()


def trained(outputs: int = 2) -> SharedTrunkNet:
    """A net for two targets that depend on difficulty, trained with torch's Adam."""
    net = SharedTrunkNet([NUM_FEATURES, 16, outputs], NUM_SEEDS)
    net.reset([0, 1])
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    x = random_features(1500, 0)
    y = torch.stack([outcomes(x, 1 + t, bias=0.5 * t) for t in range(2)], 1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x)[..., :2], y.expand(NUM_SEEDS, -1, -1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def net() -> SharedTrunkNet:
    return trained()


def auc(net: SharedTrunkNet, bias: float, own: float) -> float:
    test = random_features(3000, 9)
    p = torch.sigmoid(net(test)).mean(0)[:, -1]
    return roc_auc(outcomes(test, 10, bias, own), p)


def test_the_other_outputs_stay_as_they_were(net: SharedTrunkNet) -> None:
    x = random_features(300, 5)
    more = extended(net, x, outcomes(x, 6)[:, None])
    test = random_features(50, 7)
    assert more(test).shape == (NUM_SEEDS, 50, 3)
    torch.testing.assert_close(more(test)[..., :2], net(test))


def test_a_few_hundred_outcomes_are_enough_for_a_target_like_the_others(net: SharedTrunkNet) -> None:
    x = random_features(200, 5)
    more = extended(net, x, outcomes(x, 6, bias=-1.0)[:, None])
    test = random_features(3000, 9)
    best = roc_auc(outcomes(test, 10, -1.0), -difficulty(test))
    assert auc(more, -1.0, 0.0) > best - 0.02
    share = torch.sigmoid(more(test)).mean(0)[:, -1].mean().item()
    assert share == pytest.approx(outcomes(test, 10, -1.0).mean().item(), abs=0.06)


def test_outcomes_of_its_own_kind_are_learnt_when_there_are_enough(net: SharedTrunkNet) -> None:
    few, many = random_features(60, 5), random_features(3000, 5)
    aucs = [auc(extended(net, x, outcomes(x, 6, own=3.0)[:, None]), 0.0, 3.0) for x in (few, many)]
    assert aucs[1] > aucs[0]
    assert aucs[1] > 0.8


def test_missing_outcomes_are_left_out(net: SharedTrunkNet) -> None:
    x = random_features(300, 5)
    y = outcomes(x, 6)
    gapped = torch.cat([x, 100.0 * random_features(40, 8)]), torch.cat([y, torch.full((40,), torch.nan)])
    a, b = (extended(net, features, labels[:, None]) for features, labels in ((x, y), gapped))
    torch.testing.assert_close(a.weights[-1], b.weights[-1])


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_outcomes_that_are_all_alike_stay_finite(net: SharedTrunkNet, constant: float) -> None:
    x = random_features(50, 5)
    p = torch.sigmoid(extended(net, x, torch.full((50, 1), constant))(x))[..., -1]
    assert p.isfinite().all()
    assert (p.mean() - constant).abs() < 0.1


# --- a kernel machine ------------------------------------------------------------------------------------------------


def machine() -> KernelMachine:
    x = random_features(800, 0)
    labels = torch.stack([0.2 * difficulty(x) + 0.5, 0.1 * difficulty(x) + 0.3 + 0.1 * x[:, 2]], 1)
    return fit_kernel(x.numpy(), [labels.numpy()])


def test_a_new_output_is_a_combination_of_the_known_ones() -> None:
    known = machine()
    x, test = random_features(300, 5).numpy(), random_features(500, 7).numpy()
    wanted = 3.0 + known(x) @ np.array([[1.5], [-0.5]], np.float32)
    new = combined(known, x, wanted.astype(np.float32))
    assert new.landmarks is known.landmarks
    np.testing.assert_allclose(new(test), 3.0 + known(test) @ np.array([[1.5], [-0.5]]), atol=0.1)


def test_few_noisy_labels_stay_near_the_mean_of_the_known_outputs() -> None:
    known = machine()
    x, test = random_features(60, 5).numpy(), random_features(500, 7).numpy()
    rng = np.random.default_rng(0)
    labels = (known(x).mean(1, keepdims=True) + rng.normal(0, 0.3, (60, 1)) + 1.0).astype(np.float32)
    found = combined(known, x, labels)(test)[:, 0]
    assert np.corrcoef(found, known(test).mean(1))[0, 1] > 0.9
    assert found.mean() == pytest.approx(known(test).mean() + 1.0, abs=0.15)


def test_an_output_without_labels_is_the_mean_of_the_known_ones() -> None:
    known = machine()
    x = random_features(40, 5).numpy()
    found = combined(known, x, np.full((40, 1), np.nan, np.float32))(x)
    np.testing.assert_allclose(found[:, 0], known(x).mean(1), atol=1e-4)


def test_a_machine_without_landmarks_learns_a_mean() -> None:
    x = random_features(80, 5).numpy()
    labels = (5.0 + np.random.default_rng(0).normal(0, 0.1, (80, 1))).astype(np.float32)
    found = combined(KernelMachine.constant(np.array([1.0, 3.0], np.float32), NUM_FEATURES), x, labels)
    np.testing.assert_allclose(found(x)[:, 0], labels.mean(), atol=0.01)
