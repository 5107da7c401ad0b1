"""How much work a prefill was: what progress lines, summaries and benchmarks count."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field


@dataclass(frozen=True)
class Work:
    """Works add up."""

    prompts: int = 0
    tokens: int = 0  # that the encoder read, each prompt whole
    computed_tokens: int = 0  # of them, without what shared prefixes saved
    padded_tokens: int = 0  # computed for nothing
    flops: float = 0.0  # of the computed tokens, padding left out
    clamped: int = 0  # activations beyond float16's range
    seconds: float = field(default=0.0, compare=False)  # in the forward passes

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding_waste(self) -> float:
        """Padding's share of all that was computed."""
        return self.padded_tokens / max(1, self.computed_tokens + self.padded_tokens)


@dataclass(frozen=True)
class ModelCost:
    """What a token costs in one block of a decoder."""

    flops_per_token: float  # in matrix products with weights
    flops_per_pair: float  # for each key that a query sees

    @classmethod
    def of_block(cls, num_weights: int, attention_width: int) -> ModelCost:
        """`attention_width` is heads times head size: scores and their weighted sum take two products of it."""
        return cls(2.0 * num_weights, 4.0 * attention_width)

    def flops(self, lengths: list[int], prefix_tokens: int, num_blocks: int) -> float:
        """Prefill of prompts with `lengths` own tokens behind a prefix whose keys are there already."""
        tokens = sum(lengths)
        pairs = sum(n * prefix_tokens + n * (n + 1) / 2 for n in lengths)
        return num_blocks * (self.flops_per_token * tokens + self.flops_per_pair * pairs)
