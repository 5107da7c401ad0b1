"""Runs transformers causal LMs over packs of prompts, without padding, with shared prefixes, for any model family.

If tokens interact in attention only, prompts can be concatenated: transformers dispatches each layer's attention to a
registered function, which keeps prompts apart, and accepts explicit token positions.
"""

# T tokens of a pack, H heads, K key-value heads, E head size, D hidden size

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from prefill_router.encoder.attention import Attention, KeyValue, Scoring, attention_for
from prefill_router.encoder.hardware import has_amx
from prefill_router.encoder.hooked_backbone import DeepestLayerReached, HookedBackbone, states_of
from prefill_router.encoder.pack import Pack, Visit

_NAME = "prefill_router"  # the name of this attention function in transformers
_POSITIONS = ("position_ids", "cache_position")  # tensors passed to attention that are already applied
_running = threading.local()


class PackedBackbone(HookedBackbone):
    """A transformers model with its attention replaced. Threads may share it: the state of a run is thread-local."""

    def __init__(self, backbone: Any, blocks: nn.ModuleList) -> None:
        """Replaces the attention of `backbone`. Raises ValueError if the model does not allow it."""
        from transformers import AttentionInterface

        AttentionInterface.register(_NAME, _attend)
        backbone.set_attn_implementation(_NAME)
        if backbone.config._attn_implementation != _NAME:
            raise ValueError("its attention cannot be replaced")
        super().__init__(backbone, blocks)
        self.windows: set[int | None] = set()  # window sizes that its layers passed to attention
        # oneDNN compiles a kernel per number of rows: 7 ms on AMX, half of a pack's time; under 1 ms elsewhere.
        self.pack_multiple = 64 if self.device.type == "cpu" and self.dtype == torch.bfloat16 and has_amx() else 1
        blocks[0].register_forward_pre_hook(_before, with_kwargs=True)
        for i, block in enumerate(blocks[:-1]):
            block.register_forward_hook(partial(_after, i + 1))

    def run(self, pack: Pack, visit: Visit, deepest: int, keep: list[KeyValue] | None = None) -> None:
        """Calls `visit(layer, states)` for layers 0 to `deepest`; the model's last layer is taken after the final norm.

        Appends each layer's keys and values to `keep`, for packs that continue this one. Raises ValueError unless each
        block calls attention exactly once.
        """
        padded = pack.padded(self.pack_multiple)
        # Padding has position 0: a model may have none beyond its context.
        positions = F.pad(pack.positions(), (0, len(padded.ids) - len(pack.ids)))
        inputs = {"input_ids": padded.ids[None], "position_ids": positions[None], "use_cache": False}
        _running.run = run = _Run(padded, len(pack.ids), visit, deepest, keep)
        try:
            run.reached(len(self.blocks), self.backbone(**inputs).last_hidden_state[0])
        except DeepestLayerReached:
            pass
        finally:
            _running.run = None
        self.windows |= run.windows
        if run.num_attended != deepest:
            raise ValueError(f"{deepest} of its blocks call attention {run.num_attended} times")


@dataclass
class _Run:
    """The state of one pack's forward pass."""

    pack: Pack
    num_tokens: int  # without padding
    visit: Visit
    deepest: int
    keep: list[KeyValue] | None
    num_attended: int = 0
    windows: set[int | None] = field(default_factory=set)
    _attentions: dict[tuple[Any, ...], Attention] = field(default_factory=dict)

    def reached(self, layer: int, states_TD: Tensor) -> None:
        self.visit(layer, states_TD[: self.num_tokens])
        if layer == self.deepest:
            raise DeepestLayerReached

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Computes attention of the next layer: (T, H, E), (T, K, E), (T, K, V) -> (T, H, V)."""
        prefix = self.pack.prefix[self.num_attended] if self.pack.prefix else None
        self.num_attended += 1
        self.windows.add(scoring.window)
        if self.keep is not None:
            self.keep.append((key[: self.num_tokens], value[: self.num_tokens]))
        kind = (scoring.scale, scoring.window, scoring.softcap, id(scoring.sinks), query.device)
        if kind not in self._attentions:
            options = (self.pack.lengths, self.pack.prefix_tokens, query.device, query.dtype)
            self._attentions[kind] = attention_for(*options, scoring)
        return self._attentions[kind](query, key, value, prefix)


def _before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (run := getattr(_running, "run", None)) is not None:
        run.reached(0, (args[0] if args else kwargs["hidden_states"])[0])


def _after(layer: int, _block: nn.Module, _args: Any, output: Any) -> None:
    if (run := getattr(_running, "run", None)) is not None:
        run.reached(layer, states_of(output)[0])


def _attend(
    _layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Replaces transformers' attention: (1, H, T, E), (1, K, T, E), (1, K, T, V) -> (1, T, H, V).

    Raises ValueError for a model-specific mask or bias, which may be too small for the load-time check to detect.
    """
    biases = [name for name, value in options.items() if isinstance(value, Tensor) and name not in _POSITIONS]
    if mask is not None or biases:
        raise ValueError(f"its attention adds {', '.join(biases) or 'a mask'}")
    by_token = (states[0].transpose(0, 1) for states in (query, key, value))
    return _running.run.attend(*by_token, Scoring(scaling, sliding_window, softcap, s_aux))[None], None
