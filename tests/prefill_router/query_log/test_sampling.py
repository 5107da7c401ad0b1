from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from prefill_router.query_log.sampling import active, at_random, chances, stratified

CONTENTS = np.random.default_rng(0).integers(0, 1 << 63, (2000, 2), dtype=np.uint64)


def test_chance_is_fair_and_hangs_on_the_prompt_alone() -> None:
    drawn = chances(CONTENTS)
    assert 0.0 <= drawn.min() < drawn.max() < 1.0
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(chances(CONTENTS[::-1]), drawn[::-1])


def test_a_larger_sample_holds_a_smaller_one() -> None:
    p = np.random.default_rng(1).random((2000, 3))
    strata = [str(i % 7) for i in range(2000)]
    for draw in (at_random, lambda c, n: stratified(c, strata, n), lambda c, n: active(c, p, n)):
        small, large = draw(CONTENTS, 50), draw(CONTENTS, 300)
        assert len(set(small.tolist())) == 50
        assert set(small.tolist()) < set(large.tolist())
        assert len(draw(CONTENTS, 5000)) == 2000


def test_strata_are_asked_alike_and_a_small_one_leaves_its_share_to_others() -> None:
    strata = ["tiny"] * 5 + ["law"] * 1500 + ["physics"] * 495
    counts = Counter(strata[i] for i in stratified(CONTENTS, strata, 105))
    assert counts == {"tiny": 5, "law": 50, "physics": 50}


def test_active_sampling_prefers_near_choices_without_taking_them_alone() -> None:
    rng = np.random.default_rng(2)
    margins = rng.random(2000) * 0.5
    p = np.stack([np.full(2000, 0.4), 0.4 + margins], 1)
    drawn = active(CONTENTS, p, 400)
    assert margins[drawn].mean() < 0.4 * margins.mean()
    assert margins[drawn].max() > np.sort(margins)[400]


def test_with_one_target_there_is_no_choice_to_learn() -> None:
    np.testing.assert_array_equal(active(CONTENTS, np.ones((2000, 1)), 10), at_random(CONTENTS, 10))
