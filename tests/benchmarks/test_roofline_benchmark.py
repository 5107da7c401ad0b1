"""The roofline of the CUDA path: its FLOPs are those that the engine reports, and its bytes can be counted by hand."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config, Qwen3Model

from benchmarks import roofline
from prefill_router.encoder.architecture import block_cost

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 16, "num_hidden_layers": 2}
LENGTHS = [5, 12, 7]


@pytest.fixture(scope="module")
def counted() -> roofline.Counted:
    return roofline.measured(SMALL, (1e12, 1e12), LENGTHS)


def test_its_flops_are_those_of_the_engine(counted: roofline.Counted) -> None:
    config = Qwen3Config(**{**roofline.HEADS, "vocab_size": 10}, **SMALL)
    cost = block_cost(Qwen3Model(config).layers[0], config)
    assert sum(part.flops for part in counted.parts.values()) == pytest.approx(cost.flops(LENGTHS, 0, 2))


def test_its_bytes_are_those_of_each_operation(counted: roofline.Counted) -> None:
    # A block multiplies the activation of one half by the other: silu in place, and the product in place.
    gates, numbers = counted.parts["gates"], sum(LENGTHS) * SMALL["intermediate_size"] * 2
    assert (gates.operations, gates.moved_bytes) == (4, 2 * numbers * (2 + 3))
    assert gates.fused_bytes == 2 * numbers * (2 + 3 - 2)


def test_nothing_waits_for_the_device(counted: roofline.Counted) -> None:
    assert counted.waits == []


def test_fused_parts_move_no_more(counted: roofline.Counted) -> None:
    for part in counted.parts.values():
        assert 0 < part.fused_bytes <= part.moved_bytes
        assert part.fused_seconds <= part.seconds
