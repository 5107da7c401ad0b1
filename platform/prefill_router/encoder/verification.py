"""Verifies a loaded encoder against transformers, so that a model that cannot be run exactly is rejected on load.

Model families differ in unexpected ways: non-causal attention, several residual streams, vision towers with as many
blocks as the decoder, a projection of the final states. Two short prompts reveal each of these.
"""

# S tokens of a prompt, D hidden size

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from prefill_router.encoder.attention import KeyValue
from prefill_router.encoder.pack import Pack, Visit

Run = Callable[[Pack, Visit, int], None]  # the signature of `HookedBackbone.run`


class PackedRun(Protocol):
    """The signature of `PackedBackbone.run`."""

    def __call__(self, pack: Pack, visit: Visit, deepest: int, keep: list[KeyValue] | None = None) -> None: ...


_LENGTHS = (2, 24)
_CAUSAL_LAYERS = 5  # non-causal attention shows in the first layers, while rounding errors grow with depth

# Bounds on relative errors due to rounding, by dtype; None is for other dtypes. In float32, other rows in the batch
# change a mixture of experts by 7e-7, and later tokens change a bidirectional model by 2e-3 or more (random weights).
_CAUSAL_BOUNDS = {torch.float32: 1e-4, None: 2e-3}
_EQUAL_BOUNDS = {torch.float32: 1e-3, None: 0.1}


@torch.inference_mode()
def check_causal(backbone: Any, max_tokens: int) -> None:
    """Raises ValueError if tokens attend to later tokens: padding and shared prefixes would then change results."""
    for length in _LENGTHS:
        first, second = _prompts(backbone, min(length, max_tokens))
        shared = len(first) // 2
        layers = zip(_states(backbone, first), _states(backbone, second), strict=True)
        for one, other in islice(layers, _CAUSAL_LAYERS):
            if not relative_error(one[:shared], other[:shared]) < _bound(_CAUSAL_BOUNDS, one):
                raise ValueError("it is not a causal LM: its tokens attend to later tokens")


@dataclass(frozen=True)
class ExpectedStates:
    """Two prompts of different lengths, and transformers' hidden states (S, D) of every layer for each prompt alone."""

    prompts: list[list[int]]
    states: list[list[Tensor]]

    def check(self, run: Run) -> None:
        """Raises ValueError unless `run` gives the expected states for each prompt alone."""
        for ids, states in zip(self.prompts, self.states, strict=True):
            _check_states(run, [ids], states)

    def matches(self, run: Run) -> bool:
        """Whether `run` gives the expected states for each prompt alone."""
        return all(_matches(run, [ids], states) for ids, states in zip(self.prompts, self.states, strict=True))

    def matches_in_batch(self, run: Run) -> bool:
        """Whether `run` gives the expected states for both prompts in one batch."""
        return _matches(run, self.prompts, [torch.cat(layer) for layer in zip(*self.states, strict=True)])

    @torch.inference_mode()
    def matches_after_prefix(self, run: PackedRun) -> bool:
        """Whether `run` gives the expected states for both prompts after their shared prefix is computed once."""
        shared = next(i for i, (one, other) in enumerate(zip(*self.prompts, strict=False)) if one != other)
        kept: list[KeyValue] = []
        device = self.states[0][0].device
        run(Pack.of([self.prompts[0][:shared]], device), lambda _layer, _states: None, len(self.states[0]) - 1, kept)
        own = [torch.cat([states[shared:] for states in layer]) for layer in zip(*self.states, strict=True)]
        return _matches(run, [ids[shared:] for ids in self.prompts], own, kept)


def _matches(run: Run, prompts: list[list[int]], expected: list[Tensor], prefix: list[KeyValue] | None = None) -> bool:
    try:
        _check_states(run, prompts, expected, prefix)
    except ValueError:
        return False
    return True


@torch.inference_mode()
def expected_states(backbone: Any, num_layers: int, hidden_size: int, max_tokens: int) -> ExpectedStates:
    """Runs transformers on two prompts. Raises ValueError unless each layer's states are (S, hidden_size)."""
    length = min(_LENGTHS[-1], max_tokens)
    first, second = _prompts(backbone, length)
    prompts = [first, second[: length // 2 + 1]]
    expected = [list(_states(backbone, ids)) for ids in prompts]
    for ids, states in zip(prompts, expected, strict=True):
        if len(states) != num_layers + 1:
            raise ValueError(f"it gives {len(states)} hidden states for {num_layers} blocks, must be one more")
        shape = (len(ids), hidden_size)
        for layer, state in enumerate(states):
            if state.shape != shape:
                raise ValueError(f"its states of layer {layer} have shape {tuple(state.shape)}, must be {shape}")
    return ExpectedStates(prompts, expected)


@torch.inference_mode()
def _check_states(
    run: Run, prompts: list[list[int]], expected: list[Tensor], prefix: list[KeyValue] | None = None
) -> None:
    seen = set()

    def visit(layer: int, states: Tensor) -> None:
        seen.add(layer)
        reference = expected[layer]
        if states.shape != reference.shape:
            raise ValueError(f"its layer {layer} has shape {tuple(states.shape)}, must be {tuple(reference.shape)}")
        error = relative_error(states, reference)
        if not error < _bound(_EQUAL_BOUNDS, states):
            raise ValueError(f"its layer {layer} differs from transformers' (relative error {error:.1g})")

    run(Pack.of(prompts, expected[0].device, prefix), visit, len(expected) - 1)
    for layer in range(len(expected)):
        if layer not in seen:
            raise ValueError(f"its layer {layer} is never reached")


def _prompts(backbone: Any, length: int) -> tuple[list[int], list[int]]:
    """Returns two prompts of `length` tokens with the same first half."""
    vocabulary_size = backbone.config.get_text_config().vocab_size
    first, second = ([(step * i + 5) % vocabulary_size for i in range(length)] for step in (13, 29))
    return first, first[: length // 2] + second[length // 2 :]


def _states(backbone: Any, ids: list[int]) -> tuple[Tensor, ...]:
    """Returns the hidden states (S, D) of each layer for one prompt."""
    device = next(iter(backbone.parameters())).device
    output = backbone(input_ids=torch.tensor([ids], device=device), use_cache=False, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states:
        raise ValueError("it gives no hidden states")
    return tuple(layer[0] for layer in states)


def _bound(bounds: Mapping[torch.dtype | None, float], states: Tensor) -> float:
    return bounds.get(states.dtype, bounds[None])


def relative_error(states: Tensor, expected: Tensor) -> float:
    """Returns ||states - expected|| / ||expected||."""
    states, expected = states.double(), expected.to(states.device, torch.float64)
    return float((states - expected).norm() / expected.norm().clamp(min=1e-30))
