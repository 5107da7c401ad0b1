from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prefill_router.predictor.counter_random import fold, seed_keys
from prefill_router.predictor.trunk import SharedTrunkNet, loss_sums
from reference import plain_net

SEEDS = [0, 1, 2]


def random_net(dropout: tuple[float, ...] = ()) -> SharedTrunkNet:
    net = SharedTrunkNet([5, 8, 4, 2], len(SEEDS), dropout)
    net.reset(SEEDS)
    return net.requires_grad_(False)


def random_features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 5, generator=torch.Generator().manual_seed(seed))


def test_each_seed_is_an_ordinary_network() -> None:
    net, features = random_net(), random_features(7)
    outputs = net(features)
    assert outputs.shape == (3, 7, 2)
    for k in range(3):
        torch.testing.assert_close(outputs[k], plain_net(net, k)(features))


def test_each_seed_may_have_rows_of_its_own() -> None:
    net, features_KBF = random_net(), random_features(3, 7)
    outputs = net(features_KBF)
    for k in range(3):
        torch.testing.assert_close(outputs[k], net(features_KBF[k])[k])


def test_weights_start_within_those_of_nn_linear() -> None:
    net = SharedTrunkNet([400, 300, 1], 2)
    net.reset([0, 1])
    for values in (net.weights[0], net.biases[0]):
        assert values.abs().max() <= 400**-0.5
        assert values.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.1)
    assert not torch.equal(net.weights[0][0], net.weights[0][1])


def test_dropout_only_with_keys_and_keeps_the_mean() -> None:
    features = torch.ones(4000, 1)
    net = SharedTrunkNet([1, 1, 1], 1, [0.0, 0.3])
    net.load_state_dict({name: torch.full((1, 1, 1), float("weights" in name)) for name in net.state_dict()})
    assert torch.equal(net(features), torch.ones(1, 4000, 1))
    dropped = net(features, fold(seed_keys([0])[:, None], torch.arange(4000)))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_features_may_be_dropped_too() -> None:
    net = SharedTrunkNet([4, 1], 1, [0.5])
    net.load_state_dict({name: torch.full_like(value, "weights" in name) for name, value in net.state_dict().items()})
    dropped = net(torch.ones(2000, 4), fold(seed_keys([0])[:, None], torch.arange(2000)))
    assert set(dropped.unique().tolist()) == {0.0, 2.0, 4.0, 6.0, 8.0}


def test_state_round_trip() -> None:
    net = random_net(dropout=(0.0, 0.3, 0.2))
    again = SharedTrunkNet.from_state(net.state_dict())
    assert not any(p.requires_grad for p in again.parameters())
    features = random_features(4)
    assert torch.equal(net(features), again(features))


def test_a_state_that_does_not_fit_together_is_an_error() -> None:
    state = random_net().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        SharedTrunkNet.from_state(state | {"biases.1": torch.zeros(3, 1, 7)})


def test_some_outputs_of_a_net_are_what_they_were() -> None:
    net, features = random_net(), random_features(6)
    torch.testing.assert_close(net.of_outputs([1])(features), net(features)[..., [1]])
    torch.testing.assert_close(net.of_outputs([1, 0])(features), net(features)[..., [1, 0]])


def test_losses_are_those_of_torch_over_the_observed_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(3, 50, 2, generator=generator), torch.rand(50, 2, generator=generator)
    labels[torch.rand(50, 2, generator=generator) < 0.3] = torch.nan
    weights = torch.tensor([1.0, 5.0])
    sums, observed = loss_sums(outputs, labels, weights)
    for k in range(3):
        expected = torch.zeros(())
        for t, weight in enumerate(weights):
            seen = ~labels[:, t].isnan()
            value = nn.BCEWithLogitsLoss(reduction="sum")(outputs[k, seen, t], labels[seen, t])
            expected = expected + weight * value
        torch.testing.assert_close(sums[k], expected)
        assert observed[k].item() == pytest.approx(float((weights * (~labels.isnan()).sum(0)).sum()))
