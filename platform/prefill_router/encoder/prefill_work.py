"""Counts of prefill work, for progress lines, summaries and benchmarks."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field


@dataclass(frozen=True)
class Work:
    """The work of some forward passes. Instances can be added."""

    prompts: int = 0
    tokens: int = 0  # of the encoded prompts, shared prefixes counted for each prompt
    computed_tokens: int = 0  # shared prefixes counted once
    padded_tokens: int = 0
    flops: float = 0.0  # of the computed tokens, without padding
    clamped: int = 0  # activations outside float16's range
    seconds: float = field(default=0.0, compare=False)  # in the forward passes

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding_waste(self) -> float:
        """Padding as a fraction of all tokens that were computed."""
        return self.padded_tokens / max(1, self.computed_tokens + self.padded_tokens)


@dataclass(frozen=True)
class ModelCost:
    """The compute cost of one decoder block."""

    flops_per_token: float  # matrix products with weights
    flops_per_pair: float  # attention of one query to one key

    @classmethod
    def of_block(cls, num_weights: int, attention_width: int) -> ModelCost:
        """`attention_width` is heads times head size: the scores and the weighted sum take one product each."""
        return cls(2.0 * num_weights, 4.0 * attention_width)

    def flops(self, lengths: list[int], prefix_tokens: int, num_blocks: int) -> float:
        """Returns the FLOPs of prompts with `lengths` tokens after a prefix whose keys are already computed."""
        tokens = sum(lengths)
        pairs = sum(n * prefix_tokens + n * (n + 1) / 2 for n in lengths)
        return num_blocks * (self.flops_per_token * tokens + self.flops_per_pair * pairs)
