from __future__ import annotations

import pytest

from prefill_router.common.money import usd


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "$0.00"),
        (1.0, "$1.00"),
        (0.426, "$0.426"),
        (0.9996, "$1.00"),
        (0.00012345, "$0.000123"),
        (12.3, "$12.30"),
        (1234.5, "$1,234.50"),
        (-0.3, "-$0.300"),
        (-1e-18, "$0.00"),
    ],
)
def test_amounts_have_three_digits_and_cents_at_least(value: float, text: str) -> None:
    assert usd(value) == text
