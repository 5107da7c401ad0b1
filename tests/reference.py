"""References: naive attention, transformers alone with `output_hidden_states=True`, a trunk as ordinary layers."""

# S tokens of a prompt, P of a prefix, L layers, D hidden size; H heads, K key-value heads, E head size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefill_router.predictor.trunk import SharedTrunkNet

# Activations are float16 with a relative rounding error of 2^-11. RTOL allows the neighbouring float16, which float32
# sums in another order may round to.
RTOL, ATOL = 1e-3, 1e-4


@torch.inference_mode()
def states_alone(backbone: Any, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """The states of all layers (L + 1, S, D) of each prompt, run alone and without padding."""
    options = {"output_hidden_states": True, "use_cache": False}
    outputs = [backbone(input_ids=torch.tensor([ids]), **options) for ids in prompts]
    return [np.stack([states[0].float().numpy() for states in output.hidden_states]) for output in outputs]


def hidden_states(folder: Path, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """`states_alone` of the model in `folder`, in float32."""
    from transformers import AutoModelForCausalLM

    return states_alone(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompts)


def assert_equals_transformers(
    folder: Path, prompts: Sequence[Sequence[int]], encoded: Mapping[str, Any], mean_from: int = 0
) -> None:
    """Checks all layers and poolings of `encoded`; the mean is over the tokens from `mean_from`."""
    for row, states in enumerate(hidden_states(folder, prompts)):
        for layer in range(len(states)):
            last, mean = encoded[f"last_{layer:03d}"][row], encoded[f"mean_{layer:03d}"][row]
            where = f"layer {layer}, row {row}"
            np.testing.assert_allclose(last, states[layer, -1], RTOL, ATOL, err_msg=where)
            np.testing.assert_allclose(mean, states[layer, mean_from:].mean(0), RTOL, ATOL, err_msg=where)


def relative_error(values: Any, expected: Any) -> NDArray[np.float64]:
    """||values - expected|| / ||expected|| of each vector along the last axis."""
    values, expected = np.asarray(values, np.float64), np.asarray(expected, np.float64)
    error: NDArray[np.float64] = np.linalg.norm(values - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return error


def causal_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a prompt, (S, H, E) and (P + S, K, E); query 0 sees P + 1 keys, or the last `window` of them."""
    per_group, num_hidden = query.shape[1] // key.shape[1], len(key) - len(query)
    key, value = (t.repeat_interleave(per_group, 1) for t in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    positions = torch.arange(len(key), device=key.device)
    own = positions[: len(query), None] + num_hidden
    is_hidden = positions[None] > own
    if window is not None:
        is_hidden |= positions[None] <= own - window
    weights = scores.masked_fill(is_hidden, -torch.inf)
    if sinks is not None:
        of_heads = sinks.to(weights)[:, None, None].expand(*weights.shape[:-1], 1)
        weights = torch.cat((weights, of_heads), -1)
    return torch.einsum("hqk,khe->qhe", weights.softmax(-1)[..., : len(key)], value)


def plain_net(net: SharedTrunkNet, k: int) -> nn.Sequential:
    """Seed k of a trunk as ordinary layers."""
    layers: list[nn.Module] = []
    for weight, bias in zip(net.weights, net.biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data = weight[k].detach().T.clone()
        linear.bias.data = bias[k, 0].detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
