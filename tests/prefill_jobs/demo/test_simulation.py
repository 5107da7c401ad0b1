from __future__ import annotations

import tomllib
from collections import Counter

import numpy as np

from prefill_jobs.demo import simulation
from prefill_router.common.validation import validate
from prefill_router.policy.pool import Target


def test_many_families_and_levels_evenly() -> None:
    corpus = simulation.simulate(240, seed=0).corpus
    counts = Counter(zip(corpus["family"].to_pylist(), corpus["level"].to_pylist(), strict=True))
    assert len({family for family, _ in counts}) >= 20
    assert {level for _, level in counts} == set(range(simulation.LEVELS))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(isinstance(prompt, str) and prompt for prompt in corpus["prompt"].to_pylist())
    assert len(set(corpus["prompt_id"].to_pylist())) == 240


def test_the_same_seed_gives_the_same_data() -> None:
    first, again, other = (simulation.simulate(150, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.outcomes != other.outcomes


def test_outcomes_follow_the_stated_skills() -> None:
    data = simulation.simulate(1200, seed=1)
    targets = [target.name for target in simulation.TARGETS]
    correct = np.array(data.outcomes["correct"]).reshape(-1, len(targets))
    tokens = np.array(data.outcomes["output_tokens"]).reshape(-1, len(targets))
    levels = np.array(data.corpus["level"])
    assert correct[levels == 0].mean() > correct[levels == 3].mean() + 0.2
    assert (tokens[levels == 3].mean(0) > 1.5 * tokens[levels == 0].mean(0)).all()
    arithmetic = np.isin(data.corpus["family"].to_pylist(), list(simulation.FAMILIES["arithmetic"]))
    abacus, scribe = targets.index("simulated/abacus"), targets.index("simulated/scribe")
    assert correct[arithmetic, abacus].mean() > correct[arithmetic, scribe].mean() + 0.3


def test_every_target_says_that_it_is_simulated() -> None:
    data = simulation.simulate(120, seed=0)
    (targets,) = tomllib.loads(data.pool_toml).values()
    names = [validate(Target, target, "pool").name for target in targets]
    assert len(names) == 5
    assert all(name.startswith("simulated/") for name in names)
    assert set(data.outcomes["target"].to_pylist()) == set(names)
    assert simulation.NOTICE in data.pool_toml
