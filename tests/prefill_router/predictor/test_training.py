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
import reference
from prefill_router.common.errors import UserError
from prefill_router.metrics import roc_auc
from prefill_router.predictor.counter_random import fold, seed_keys
from prefill_router.predictor.data_loader import Rows, WorkerRows
from prefill_router.predictor.recipe import Recipe
from prefill_router.predictor.training import FittedTrunk, Trainer, fit
from prefill_router.predictor.trunk import SharedTrunkNet
from reference import plain_net

TINY = Recipe(hidden=(8, 4), batch_size=32, max_epochs=4, num_seeds=3, keep=2)
FULL_BATCH = Recipe(hidden=(8, 4), dropout=(0.0, 0.0), batch_size=1000, max_epochs=6, num_seeds=3, keep=3)
RECIPES = {"as usual": replace(TINY, input_dropout=0.1), "full batch": FULL_BATCH}


def separable(num_prompts: int, seed: int = 0, missing: float = 0.2) -> Rows:
    """Rows with five features; the first two determine the outcomes of two targets, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_prompts, 5, generator=generator)
    noise = 0.2 * torch.randn(num_prompts, 2, generator=generator)
    labels = (features[:, :2] + noise > 0).float()
    labels[torch.rand(num_prompts, 2, generator=generator) < missing] = torch.nan
    return Rows(features, labels, fold(seed_keys([seed])[0], torch.arange(num_prompts)))


def feed(train: Rows, validation: Rows, num_shards: int = 1, own: list[int] | None = None) -> WorkerRows:
    """A Feed of the rows in shards of equal size; `own` lists the shards of this worker."""
    cut = {i: train[i * len(train) // num_shards : (i + 1) * len(train) // num_shards] for i in range(num_shards)}
    mine = range(num_shards) if own is None else own
    held_out = {i: validation[i::num_shards] for i in mine}
    return WorkerRows([len(rows) for rows in cut.values()], {i: cut[i] for i in mine}, held_out, train[:0])


def trainer(recipe: Recipe, seed: int = 0, weights: tuple[float, ...] = (1.0, 1.0)) -> Trainer:
    return Trainer(recipe, 5, weights, seed)


def fitted(
    train: Rows, validation: Rows, recipe: Recipe, seed: int = 0, weights: tuple[float, ...] = (1.0, 1.0)
) -> FittedTrunk:
    trained = trainer(recipe, seed, weights)
    fit(feed(train, validation), trained, seed)
    return trained.fitted()


def plain_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    observed = ~labels.isnan()
    result: Tensor = nn.BCEWithLogitsLoss()(outputs[observed], labels[observed])
    return result


def assert_same_weights(a: SharedTrunkNet, b: SharedTrunkNet, atol: float = 0.0) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=0.0, atol=atol)


@pytest.mark.parametrize("decoupled", [False, True])
def test_seeds_trained_at_once_are_networks_trained_alone(decoupled: bool) -> None:
    train = separable(60)
    recipe = replace(FULL_BATCH, decoupled_decay=decoupled)
    start = trainer(recipe, seed=4)
    alone = [plain_net(start.net, k) for k in range(3)]
    trained = fitted(train, train, recipe, seed=4)
    assert trained.best_epochs == [5, 5, 5]
    losses = []
    for net in alone:
        algorithm = torch.optim.AdamW if decoupled else torch.optim.Adam
        optimizer = algorithm(net.parameters(), lr=1e-3, weight_decay=1e-4)
        for _ in range(6):
            optimizer.zero_grad()
            plain_loss(net(train.features), train.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses.append(plain_loss(net(train.features), train.labels).item())
    for k, place in enumerate(np.argsort(losses)):
        assert trained.validation_losses[k] == pytest.approx(losses[place], rel=1e-4, abs=1e-5)
        outputs = alone[place](train.features)
        torch.testing.assert_close(trained.net(train.features)[k], outputs, rtol=0.0, atol=1e-4)


def test_a_seed_alone_and_among_others_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = separable(200), separable(60, seed=1)
    recipe = replace(TINY, input_dropout=0.1, learning_rate=0.03, max_epochs=40, patience=2, keep=3)
    together = trainer(recipe)
    fit(feed(train, validation), together, 0)
    assert len(set(together.best_epochs.tolist())) > 1  # seeds stopped at different epochs
    for k in range(3):
        # With seed 1, the only seed is then 1 * k: the k-th of those trained together.
        monkeypatch.setattr("prefill_router.predictor.training._SEEDS_APART", k)
        alone = trainer(replace(recipe, num_seeds=1), seed=1)
        fit(feed(train, validation), alone, 0)
        assert alone.best_epochs[0] == together.best_epochs[k]
        assert alone.best_losses[0].item() == pytest.approx(together.best_losses[k].item(), rel=1e-5)
        for one, many in zip(alone.best, together.best, strict=True):
            torch.testing.assert_close(one[0], many[k], rtol=0.0, atol=1e-5)


def test_a_separable_problem_is_learnt() -> None:
    train, validation, test = separable(1200, seed=1), separable(200, seed=2), separable(400, seed=3, missing=0.0)
    recipe = Recipe(hidden=(32, 16), max_epochs=12, batch_size=64, num_seeds=4, keep=2)
    p = torch.sigmoid(fitted(train, validation, recipe).net(test.features)).mean(0)
    for t in range(2):
        assert roc_auc(test.labels[:, t], p[:, t]) > 0.95


def test_missing_labels_teach_nothing() -> None:
    train, validation = separable(80), separable(40, seed=1)
    ungraded = torch.arange(80) % 4 == 0
    train.labels[ungraded] = torch.nan
    other = train.features.clone()
    other[ungraded] = 10.0 * torch.randn(int(ungraded.sum()), 5, generator=torch.Generator().manual_seed(9))
    changed = Rows(other, train.labels, train.keys)
    assert_same_weights(fitted(train, validation, TINY).net, fitted(changed, validation, TINY).net)


def test_missing_labels_do_not_count_in_validation() -> None:
    train, validation = separable(80), separable(40, seed=1)
    ungraded = separable(20, seed=2)
    ungraded.labels.fill_(torch.nan)
    with_more = fitted(train, Rows.concatenate([validation, ungraded]), TINY)
    assert with_more.validation_losses == pytest.approx(fitted(train, validation, TINY).validation_losses, rel=1e-5)


def test_weights_let_a_sparse_target_learn() -> None:
    train, validation, test = separable(3000, missing=0.0), separable(600, seed=1), separable(1000, 2, missing=0.0)
    train.labels[60:, 1] = torch.nan
    recipe = Recipe(hidden=(8,), dropout=(0.0,), max_epochs=8, batch_size=128, num_seeds=4, keep=4)
    aucs = []
    for weight in (1.0, 50.0):
        p = torch.sigmoid(fitted(train, validation, recipe, weights=(1.0, weight)).net(test.features)).mean(0)
        aucs.append([roc_auc(test.labels[:, t], p[:, t]) for t in range(2)])
    assert aucs[1][1] > aucs[0][1] + 0.02
    assert aucs[1][0] > aucs[0][0] - 0.02


def test_smoothed_labels_keep_probabilities_from_the_ends() -> None:
    train, validation = separable(400, missing=0.0), separable(100, seed=1)
    recipe = Recipe(hidden=(16,), dropout=(0.0,), max_epochs=30, batch_size=64, num_seeds=2, keep=2)
    sharp, smooth = (
        fitted(train, validation, replace(recipe, label_smoothing=s)).net(train.features).abs().mean()
        for s in (0.0, 0.4)
    )
    assert smooth < sharp


def test_kept_weights_have_the_reported_validation_loss() -> None:
    train, validation = separable(80), separable(40, seed=1)
    trained = fitted(train, validation, TINY)
    for k, outputs in enumerate(trained.net(validation.features)):
        expected = plain_loss(outputs, validation.labels).item()
        assert expected == pytest.approx(trained.validation_losses[k], rel=1e-4, abs=1e-5)


def test_products_in_bfloat16_learn_as_much() -> None:
    train, validation = separable(1200, seed=1), separable(400, seed=2)
    recipe = Recipe(hidden=(32, 16), max_epochs=12, batch_size=64, num_seeds=4, keep=2)
    full, half = (fitted(train, validation, replace(recipe, precision=p)) for p in ("float32", "bfloat16"))
    np.testing.assert_allclose(half.validation_losses, full.validation_losses, atol=0.02)
    assert half.validation_losses != full.validation_losses
    assert half.net.weights[0].dtype == torch.float32


def test_the_seeds_with_the_lowest_validation_losses_are_kept() -> None:
    train, validation = separable(80), separable(40, seed=1)
    everyone, kept = (fitted(train, validation, replace(TINY, num_seeds=6, keep=keep)) for keep in (6, 2))
    assert everyone.validation_losses == sorted(everyone.validation_losses)
    assert kept.validation_losses == everyone.validation_losses[:2]
    assert torch.equal(kept.net(validation.features), everyone.net(validation.features)[:2])


def test_training_stops_after_its_patience_without_progress() -> None:
    stuck = replace(TINY, learning_rate=0.0, max_epochs=50, patience=3)
    trained = fitted(separable(40), separable(20, seed=1), stuck)
    assert trained.num_epochs == 4
    assert trained.best_epochs == [0, 0]


def test_a_seed_is_a_seed() -> None:
    train, validation = separable(80), separable(40, seed=1)
    first, again, other = (fitted(train, validation, TINY, seed=seed) for seed in (3, 3, 4))
    assert_same_weights(first.net, again.net)
    assert not torch.equal(first.net.weights[0], other.net.weights[0])


@pytest.mark.parametrize("epochs", [1, 3, 7])
def test_a_trainer_goes_on_from_a_state_to_the_same_result(epochs: int) -> None:
    train, validation = separable(200), separable(60, seed=1)
    recipe = replace(TINY, max_epochs=10, patience=2)
    whole = fitted(train, validation, recipe)
    states: list[dict[str, Tensor]] = []
    first = trainer(recipe)
    fit(feed(train, validation), first, 0, lambda _: states.append({n: t.clone() for n, t in first.state().items()}))
    resumed = trainer(recipe)
    resumed.load(states[min(epochs, len(states)) - 1])
    fit(feed(train, validation), resumed, 0)
    assert_same_weights(resumed.fitted().net, whole.net)
    assert resumed.fitted().validation_losses == whole.validation_losses


@pytest.mark.parametrize("spoil", [lambda r: r.labels.fill_(torch.nan), lambda r: r.features.fill_(torch.inf)])
def test_no_finite_validation_loss_is_an_error(spoil: Callable[[Rows], Tensor]) -> None:
    validation = separable(20, seed=1)
    spoil(validation)
    with pytest.raises(UserError, match="training diverged, or no validation prompt has an outcome"):
        fitted(separable(40), validation, replace(TINY, patience=1))


# --- several workers -------------------------------------------------------------------------------------------------

# The shards of each of two workers.
SHARES = {"in turn": [[0, 2, 4], [1, 3]], "one has none": [[0, 1, 2, 3, 4], []]}


def work(rank: int, folder: Path) -> None:
    """Runs one of two workers: trains on its shards with each recipe and saves the results."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name, recipe in RECIPES.items():
        for share, shards in SHARES.items():
            shared = trainer(recipe, seed=5)
            fit(feed(separable(80), separable(40, seed=1), 5, shards[rank]), shared, 5)
            got = shared.fitted()
            results[f"{name}, {share}"] = (got.net.state_dict(), got.validation_losses, got.best_epochs)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, FittedTrunk]]:
    """Returns the results of each of two processes, by recipe and share."""
    folder = tmp_path_factory.mktemp("two_workers")
    sources = [str(Path(prefill_router.__file__).parents[1]), str(Path(reference.__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sources), "OMP_NUM_THREADS": "1"}
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


@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_two_workers_agree(two_workers: list[dict[str, FittedTrunk]], recipe: str, share: str) -> None:
    first, second = (results[f"{recipe}, {share}"] for results in two_workers)
    assert_same_weights(first.net, second.net)
    assert first.validation_losses == second.validation_losses
    assert first.best_epochs == second.best_epochs


@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_two_workers_do_what_one_would(two_workers: list[dict[str, FittedTrunk]], recipe: str, share: str) -> None:
    shared = two_workers[0][f"{recipe}, {share}"]
    alone = trainer(RECIPES[recipe], seed=5)
    fit(feed(separable(80), separable(40, seed=1), 5), alone, 5)
    np.testing.assert_allclose(shared.validation_losses, alone.fitted().validation_losses, rtol=1e-5)
    assert_same_weights(shared.net, alone.fitted().net, atol=1e-5)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
