"""Holds a loaded encoder against transformers: what cannot be read exactly is refused before it reads a prompt.

Families differ in more than their names say: tokens that see later ones, several residual streams, vision towers as
deep as the text, states that are projected at the end. Two short prompts show each of these in any of them.
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
from prefill_router.encoder.decoder import Pack, Visit

Run = Callable[[Pack, Visit, int], None]  # as `HookedBackbone.run`


class RunOfPacks(Protocol):
    """As `Decoder.run`."""

    def __call__(self, pack: Pack, visit: Visit, deepest: int, keep: list[KeyValue] | None = None) -> None: ...


_LENGTHS = (2, 24)
_CAUSAL_LAYERS = 5  # attention shows in the first ones, while rounding adds up with depth

# Relative errors that rounding stays below; of types that are not here, the last. A mixture of experts rounds otherwise
# for other rows, by 7e-7 in float32, where a bidirectional model of random weights differs by 2e-3, and others by more.
_SEES_LATER = {torch.float32: 1e-4, None: 2e-3}
_DIFFERS = {torch.float32: 1e-3, None: 0.1}


@torch.inference_mode()
def check_causal(backbone: Any, max_tokens: int) -> None:
    """Raises ValueError if a token sees the ones after it: batches could not be padded, nor prefixes shared."""
    for length in _LENGTHS:
        first, second = _prompts(backbone, min(length, max_tokens))
        shared = len(first) // 2
        layers = zip(_states(backbone, first), _states(backbone, second), strict=True)
        for one, other in islice(layers, _CAUSAL_LAYERS):
            if not _relative_error(one[:shared], other[:shared]) < _bound(_SEES_LATER, one):
                raise ValueError("it is no causal LM: its tokens see the ones after them")


@dataclass(frozen=True)
class ExpectedStates:
    """Prompts of two lengths, and what transformers gives for each alone: a state (S, D) for every layer."""

    prompts: list[list[int]]
    states: list[list[Tensor]]

    def check(self, run: Run) -> None:
        """Raises ValueError unless `run` gives the same for each prompt alone."""
        for ids, states in zip(self.prompts, self.states, strict=True):
            _check_states(run, [ids], states)

    def holds(self, run: Run) -> bool:
        """Does `run` give the same for each prompt alone?"""
        return all(_holds(run, [ids], states) for ids, states in zip(self.prompts, self.states, strict=True))

    def holds_in_company(self, run: Run) -> bool:
        """Does `run` give the same for both prompts at once?"""
        return _holds(run, self.prompts, [torch.cat(layer) for layer in zip(*self.states, strict=True)])

    @torch.inference_mode()
    def holds_after_prefix(self, run: RunOfPacks) -> bool:
        """Does `run` give the same for both prompts after what they share, which is computed once?"""
        shared = next(i for i, (one, other) in enumerate(zip(*self.prompts, strict=False)) if one != other)
        kept: list[KeyValue] = []
        device = self.states[0][0].device
        run(Pack.of([self.prompts[0][:shared]], device), lambda _layer, _states: None, len(self.states[0]) - 1, kept)
        own = [torch.cat([states[shared:] for states in layer]) for layer in zip(*self.states, strict=True)]
        return _holds(run, [ids[shared:] for ids in self.prompts], own, kept)


def _holds(run: Run, prompts: list[list[int]], expected: list[Tensor], prefix: list[KeyValue] | None = None) -> bool:
    try:
        _check_states(run, prompts, expected, prefix)
    except ValueError:
        return False
    return True


@torch.inference_mode()
def expected_states(backbone: Any, num_layers: int, hidden_size: int, max_tokens: int) -> ExpectedStates:
    """What transformers gives for two prompts. Raises ValueError unless each layer has a state (S, hidden_size)."""
    length = min(_LENGTHS[-1], max_tokens)
    first, second = _prompts(backbone, length)
    prompts = [first, second[: length // 2 + 1]]
    expected = [list(_states(backbone, ids)) for ids in prompts]
    for ids, states in zip(prompts, expected, strict=True):
        if len(states) != num_layers + 1:
            raise ValueError(f"it gives {len(states)} hidden states for {num_layers} blocks, must be one more")
        wanted = (len(ids), hidden_size)
        for layer, state in enumerate(states):
            if state.shape != wanted:
                raise ValueError(f"its states of layer {layer} have shape {tuple(state.shape)}, must be {wanted}")
    return ExpectedStates(prompts, expected)


@torch.inference_mode()
def _check_states(
    run: Run, prompts: list[list[int]], expected: list[Tensor], prefix: list[KeyValue] | None = None
) -> None:
    seen = set()

    def visit(layer: int, states: Tensor) -> None:
        seen.add(layer)
        wanted = expected[layer]
        if states.shape != wanted.shape:
            raise ValueError(f"its layer {layer} gives {tuple(states.shape)}, must be {tuple(wanted.shape)}")
        error = _relative_error(states, wanted)
        if not error < _bound(_DIFFERS, states):
            raise ValueError(f"its layer {layer} is not read as transformers gives it (relative error {error:.1g})")

    run(Pack.of(prompts, expected[0].device, prefix), visit, len(expected) - 1)
    for layer in range(len(expected)):
        if layer not in seen:
            raise ValueError(f"its layer {layer} is never reached")


def _prompts(backbone: Any, length: int) -> tuple[list[int], list[int]]:
    """Two prompts of `length` tokens; the first half of them is the same."""
    vocabulary_size = backbone.config.get_text_config().vocab_size
    first, second = ([(step * i + 5) % vocabulary_size for i in range(length)] for step in (13, 29))
    return first, first[: length // 2] + second[length // 2 :]


def _states(backbone: Any, ids: list[int]) -> tuple[Tensor, ...]:
    """The hidden states of each layer, without the batch."""
    device = next(iter(backbone.parameters())).device
    output = backbone(input_ids=torch.tensor([ids], device=device), use_cache=False, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states:
        raise ValueError("it gives no hidden states")
    return tuple(layer[0] for layer in states)


def _bound(bounds: Mapping[torch.dtype | None, float], states: Tensor) -> float:
    return bounds.get(states.dtype, bounds[None])


def _relative_error(states: Tensor, expected: Tensor) -> float:
    states, expected = states.double(), expected.double()
    return float((states - expected).norm() / expected.norm().clamp(min=1e-30))
