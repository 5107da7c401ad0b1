from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import prefill_router
from prefill_router.errors import UserError
from prefill_router.metrics import roc_auc
from prefill_router.trunk import Examples, FittedTrunk, Loss, Recipe, SharedTrunkNet, fit_trunk

TINY = Recipe(hidden=(8, 4), batch_size=32, max_epochs=4, num_seeds=3, keep=2)
FULL_BATCH = Recipe(hidden=(8, 4), dropout=(0.0, 0.0), batch_size=1000, max_epochs=6, num_seeds=3, keep=3)
RECIPES = {"as usual": TINY, "full batch": FULL_BATCH}


def separable(num_prompts: int, seed: int = 0, missing: float = 0.2) -> Examples:
    """Five features, the first two of which tell the outcomes of two targets but for a little noise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_prompts, 5, generator=generator)
    noise = 0.2 * torch.randn(num_prompts, 2, generator=generator)
    labels = (features[:, :2] + noise > 0).float()
    labels[torch.rand(num_prompts, 2, generator=generator) < missing] = torch.nan
    return Examples(features, labels)


def random_net(num_seeds: int = 3, dropout: tuple[float, ...] = ()) -> SharedTrunkNet:
    net = SharedTrunkNet([5, 8, 4, 2], num_seeds, dropout)
    net.reset([torch.Generator().manual_seed(k) for k in range(num_seeds)])
    return net


def plain_net(net: SharedTrunkNet, k: int) -> nn.Sequential:
    """Seed k as ordinary layers."""
    layers: list[nn.Module] = []
    for weight, bias in zip(net.weights, net.biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data = weight[k].detach().T.clone()
        linear.bias.data = bias[k, 0].detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plain_loss(outputs: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    observed = ~labels.isnan()
    function = nn.BCEWithLogitsLoss() if loss == "cross_entropy" else nn.MSELoss()
    result: Tensor = function(outputs[observed], labels[observed])
    return result


def assert_same_weights(a: SharedTrunkNet, b: SharedTrunkNet, atol: float = 0.0) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=0.0, atol=atol)


def test_each_seed_is_an_ordinary_network() -> None:
    net, features = random_net(), separable(7).features
    outputs = net(features)
    assert outputs.shape == (3, 7, 2)
    for k in range(3):
        torch.testing.assert_close(outputs[k], plain_net(net, k)(features))


def test_each_seed_may_have_rows_of_its_own() -> None:
    net = random_net()
    features_KBF = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    outputs = net(features_KBF)
    for k in range(3):
        torch.testing.assert_close(outputs[k], net(features_KBF[k])[k])


def test_weights_start_within_those_of_nn_linear() -> None:
    net = SharedTrunkNet([400, 300, 1], 2)
    net.reset([torch.Generator().manual_seed(k) for k in range(2)])
    for values in (net.weights[0], net.biases[0]):
        assert values.abs().max() <= 400**-0.5
        assert values.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.1)
    assert not torch.equal(net.weights[0][0], net.weights[0][1])


def test_dropout_only_with_generators_and_keeps_the_mean() -> None:
    features = torch.ones(4000, 1)
    net = SharedTrunkNet([1, 1, 1], 1, [0.3])
    net.load_state_dict({name: torch.full((1, 1, 1), float("weights" in name)) for name in net.state_dict()})
    assert torch.equal(net(features), torch.ones(1, 4000, 1))
    dropped = net(features, [torch.Generator().manual_seed(0)])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_state_round_trip() -> None:
    net = random_net(dropout=(0.3, 0.2))
    again = SharedTrunkNet.from_state(net.state_dict())
    assert_same_weights(net, again)
    assert not any(p.requires_grad for p in again.parameters())
    features = separable(4).features
    assert torch.equal(net(features), again(features))


def test_a_state_that_does_not_fit_together_is_an_error() -> None:
    state = random_net().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        SharedTrunkNet.from_state(state | {"biases.1": torch.zeros(3, 1, 7)})


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_seeds_trained_at_once_are_networks_trained_alone(loss: Loss) -> None:
    train = separable(60)
    recipe = replace(FULL_BATCH, loss=loss)
    initial = fit_trunk(train, train, replace(recipe, learning_rate=0.0, max_epochs=1), seed=4)
    trained = fit_trunk(train, train, recipe, seed=4)
    assert trained.best_epochs == [5, 5, 5]
    alone = []
    for k in range(3):
        net = plain_net(initial.net, k)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
        for _ in range(6):
            optimizer.zero_grad()
            plain_loss(net(train.features), train.labels, loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        alone.append((plain_loss(net(train.features), train.labels, loss).item(), net))
    alone.sort(key=lambda pair: pair[0])
    for k, (validation_loss, net) in enumerate(alone):
        assert trained.validation_losses[k] == pytest.approx(validation_loss, rel=1e-5)
        torch.testing.assert_close(trained.net(train.features)[k], net(train.features), rtol=0.0, atol=1e-5)


def test_a_separable_problem_is_learnt() -> None:
    train, validation, test = separable(1200, seed=1), separable(200, seed=2), separable(400, seed=3, missing=0.0)
    recipe = Recipe(hidden=(32, 16), max_epochs=12, batch_size=64, num_seeds=4, keep=2)
    p = torch.sigmoid(fit_trunk(train, validation, recipe, seed=0).net(test.features)).mean(0)
    for t in range(2):
        assert roc_auc(test.labels[:, t], p[:, t]) > 0.95


def test_missing_labels_teach_nothing() -> None:
    train, validation = separable(80), separable(40, seed=1)
    ungraded = torch.arange(80) % 4 == 0
    train.labels[ungraded] = torch.nan
    other = train.features.clone()
    other[ungraded] = 10.0 * torch.randn(int(ungraded.sum()), 5, generator=torch.Generator().manual_seed(9))
    fitted = fit_trunk(train, validation, TINY, seed=0)
    assert_same_weights(fitted.net, fit_trunk(Examples(other, train.labels), validation, TINY, seed=0).net)


def test_missing_labels_do_not_count_in_validation() -> None:
    train, validation = separable(80), separable(40, seed=1)
    more = Examples(
        torch.cat([validation.features, torch.randn(20, 5, generator=torch.Generator().manual_seed(0))]),
        torch.cat([validation.labels, torch.full((20, 2), torch.nan)]),
    )
    fitted, with_more = (fit_trunk(train, v, TINY, seed=0) for v in (validation, more))
    assert with_more.validation_losses == pytest.approx(fitted.validation_losses, rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_kept_weights_have_the_reported_validation_loss(loss: Loss) -> None:
    train, validation = separable(80), separable(40, seed=1)
    fitted = fit_trunk(train, validation, replace(TINY, loss=loss), seed=0)
    for k, outputs in enumerate(fitted.net(validation.features)):
        assert plain_loss(outputs, validation.labels, loss).item() == pytest.approx(
            fitted.validation_losses[k], rel=1e-5
        )


def test_the_seeds_with_the_lowest_validation_losses_are_kept() -> None:
    train, validation = separable(80), separable(40, seed=1)
    everyone = fit_trunk(train, validation, replace(TINY, num_seeds=6, keep=6), seed=0)
    kept = fit_trunk(train, validation, replace(TINY, num_seeds=6, keep=2), seed=0)
    assert everyone.validation_losses == sorted(everyone.validation_losses)
    assert kept.validation_losses == everyone.validation_losses[:2]
    assert torch.equal(kept.net(validation.features), everyone.net(validation.features)[:2])


def test_training_stops_after_its_patience_without_progress() -> None:
    train, validation = separable(40), separable(20, seed=1)
    stuck = replace(TINY, learning_rate=0.0, max_epochs=50, patience=3)
    fitted = fit_trunk(train, validation, stuck, seed=0)
    assert fitted.num_epochs == 4
    assert fitted.best_epochs == [0, 0]


def test_a_seed_is_a_seed() -> None:
    train, validation = separable(80), separable(40, seed=1)
    first, again, other = (fit_trunk(train, validation, TINY, seed=seed) for seed in (3, 3, 4))
    assert_same_weights(first.net, again.net)
    assert not torch.equal(first.net.weights[0], other.net.weights[0])


@pytest.mark.parametrize("spoil", [lambda e: e.labels.fill_(torch.nan), lambda e: e.features.fill_(torch.inf)])
def test_no_finite_validation_loss_is_an_error(spoil: Callable[[Examples], Tensor]) -> None:
    validation = separable(20, seed=1)
    spoil(validation)
    with pytest.raises(UserError, match="training diverged, or no validation prompt has an outcome"):
        fit_trunk(separable(40), validation, replace(TINY, patience=1), seed=0)


def share_of(examples: Examples, rank: int, num_of_first: int) -> Examples:
    rows = slice(None, num_of_first) if rank == 0 else slice(num_of_first, None)
    return Examples(examples.features[rows], examples.labels[rows])


def work(rank: int, folder: Path) -> None:
    """One of two workers: trains on its share of the rows by each recipe, and writes down what it got."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train, validation = separable(80), separable(40, seed=1)
    results = {}
    for name, recipe in RECIPES.items():
        for num_of_first in (55, 80):
            shares = share_of(train, rank, num_of_first), share_of(validation, rank, 25)
            fitted = fit_trunk(*shares, recipe, seed=5)
            results[f"{name}, {num_of_first}"] = (fitted.net.state_dict(), fitted.validation_losses, fitted.best_epochs)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, FittedTrunk]]:
    """What each of two processes got, by recipe and number of rows of the first."""
    folder = tmp_path_factory.mktemp("two_workers")
    source = str(Path(prefill_router.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    workers = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    results = []
    for rank in range(2):
        saved = torch.load(folder / f"{rank}.pt", weights_only=True)
        results.append(
            {name: FittedTrunk(SharedTrunkNet.from_state(s), losses, e, 0) for name, (s, losses, e) in saved.items()}
        )
    return results


@pytest.mark.parametrize("num_of_first", [55, 80])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_two_workers_agree(two_workers: list[dict[str, FittedTrunk]], recipe: str, num_of_first: int) -> None:
    first, second = (results[f"{recipe}, {num_of_first}"] for results in two_workers)
    assert_same_weights(first.net, second.net)
    assert first.validation_losses == second.validation_losses
    assert first.best_epochs == second.best_epochs


@pytest.mark.parametrize("num_of_first", [55, 80])
def test_two_workers_do_what_one_would(two_workers: list[dict[str, FittedTrunk]], num_of_first: int) -> None:
    shared = two_workers[0][f"full batch, {num_of_first}"]
    alone = fit_trunk(separable(80), separable(40, seed=1), FULL_BATCH, seed=5)
    np.testing.assert_allclose(shared.validation_losses, alone.validation_losses, rtol=1e-5)
    assert_same_weights(shared.net, alone.net, atol=1e-5)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
