from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.train.kernel_sample import sample_rows
from prefill_router.corpus.split import Part, Split, mixed
from prefill_router.probe.moments import Moments
from prefill_router.probe.projection import Projection, fit_projection

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def graded(activations: str, small_data: Path) -> GradedStore:
    outcomes, pool = str(small_data / "outcomes.parquet"), str(small_data / "pool.toml")
    return GradedStore.open(activations, outcomes, pool, ignore_unknown=False).only(Split(), Part.TRAIN)


@pytest.fixture
def projections(graded: GradedStore) -> list[Projection]:
    column = graded.store.columns[0]
    x = np.concatenate([x for x, *_ in graded.batches(column, range(graded.store.num_shards))])
    return [fit_projection(column, Moments.of(x))]


@pytest.mark.parametrize("max_rows", [1, 40, 10_000])
def test_a_sample_has_the_prompts_of_the_lowest_hashes(
    graded: GradedStore, projections: list[Projection], max_rows: int
) -> None:
    sample = sample_rows(graded, projections, max_rows)
    expected = sorted(graded.graded_keys.tolist(), key=lambda key: int(mixed(np.array([key], np.uint64))[0]))
    assert sample.keys.tolist() == expected[:max_rows]
    answers = graded.answers(sample.keys)
    np.testing.assert_array_equal(sample.correct, answers.correct)
    np.testing.assert_array_equal(sample.output_tokens, answers.output_tokens)
    assert sample.features.shape == (len(sample.keys), projections[0].num_features)


def test_rows_of_a_sample_belong_together(graded: GradedStore, projections: list[Projection]) -> None:
    sample = sample_rows(graded, projections, 50)
    whole = sample_rows(graded, projections, 10_000)
    place = {key: i for i, key in enumerate(whole.keys.tolist())}
    rows = [place[key] for key in sample.keys.tolist()]
    np.testing.assert_array_equal(sample.features, whole.features[rows])
    np.testing.assert_array_equal(sample.num_tokens, whole.num_tokens[rows])
