"""Off-policy estimates against the true value in simulated logs."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_router.common.errors import UserError
from prefill_router.evaluation.off_policy import Log, every_reward, policy_value

SHARE = 0.3  # of requests that explore
N, T = 600, 3


def world(seed: int) -> tuple[Log, np.ndarray, np.ndarray, float]:
    """The log of an exploring policy, another policy's choices, the true P(correct), and that policy's true value."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.1, 0.9, (N, T))
    logging, other = rng.integers(0, T, N), p.argmax(1)
    chosen = np.where(rng.random(N) < SHARE, rng.integers(0, T, N), logging)
    propensity = SHARE / T + (1 - SHARE) * (chosen == logging)
    rows = np.arange(N)
    reward = (rng.random(N) < p[rows, chosen]).astype(float)
    return Log(chosen, reward, propensity), other, p, float(p[rows, other].mean())


@pytest.mark.parametrize("is_good", [True, False])
def test_estimates_are_unbiased_and_a_good_model_reduces_their_variance(is_good: bool) -> None:
    errors = {name: [] for name in ("ips", "snips", "doubly_robust")}
    for seed in range(150):
        log, other, p, truth = world(seed)
        value = policy_value("best", log, other, p if is_good else 1.0 - p, num_draws=2)
        for name, found in errors.items():
            found.append(getattr(value, name).value - truth)
    for name, found in errors.items():
        assert abs(np.mean(found)) < 3.5 * np.std(found) / np.sqrt(len(found)), name
    if is_good:
        assert np.std(errors["doubly_robust"]) < 0.8 * np.std(errors["ips"])


def test_intervals_contain_the_truth() -> None:
    held = dict.fromkeys(("ips", "snips", "doubly_robust"), 0)
    for seed in range(100):
        log, other, p, truth = world(1_000 + seed)
        value = policy_value("best", log, other, p, num_draws=300)
        for name in held:
            _, low, high = getattr(value, name)
            held[name] += low <= truth <= high
    assert all(88 <= count <= 100 for count in held.values()), held


def test_a_logging_policy_that_never_explored_has_its_mean_reward() -> None:
    rng = np.random.default_rng(0)
    chosen, reward = rng.integers(0, T, N), rng.random(N)
    log = Log(chosen, reward, np.ones(N))
    value = policy_value("logged", log, chosen, rng.random((N, T)))
    for estimate in (value.ips, value.snips, value.doubly_robust):
        assert estimate.value == pytest.approx(reward.mean())
    assert value.support == 1.0
    assert value.effective_requests == pytest.approx(N)


def test_a_policy_that_the_log_never_follows_has_no_support() -> None:
    log = Log(np.zeros(N, int), np.ones(N), np.ones(N))
    value = policy_value("other", log, np.ones(N, int), np.full((N, T), 0.25))
    assert value.support == 0.0
    assert np.isnan(value.snips.value)
    assert value.doubly_robust.value == value.model == pytest.approx(0.25)  # the model alone


def test_requests_of_other_targets_count_as_not_chosen() -> None:
    chosen = np.array([0, 0, -1, -1])
    value = policy_value("always", Log(chosen, np.ones(4), np.full(4, 0.5)), np.zeros(4, int), np.full((4, 1), 0.5))
    assert value.ips.value == pytest.approx(1.0)
    assert value.support == 1.0


@pytest.mark.parametrize("propensity", [0.0, -0.1, 1.5, float("nan")])
def test_propensities_must_be_probabilities(propensity: float) -> None:
    with pytest.raises(UserError, match="propensity must be above 0"):
        Log(np.zeros(1, int), np.ones(1), np.array([propensity]))
    with pytest.raises(UserError, match="no request with an outcome"):
        Log(np.zeros(0, int), np.ones(0), np.ones(0))


def test_estimates_of_every_reward_are_the_expected_ones_whatever_the_model() -> None:
    """Exactly: their mean over all choices, weighted by probability. A target of another pool tells nothing."""
    reward, model, propensity = np.array([0.0, 1.0, 0.25]), np.array([[0.9, 0.4, 0.1]]), np.array([0.1, 0.7, 0.2])
    logs = [Log(np.array([t]), reward[[t]], propensity[[t]]) for t in range(3)]
    mean = sum(share * every_reward(log, model)[0] for share, log in zip(propensity, logs, strict=True))
    np.testing.assert_allclose(mean, reward, atol=1e-12)
    np.testing.assert_array_equal(every_reward(Log(np.array([-1]), reward[:1], propensity[:1]), model), model)
