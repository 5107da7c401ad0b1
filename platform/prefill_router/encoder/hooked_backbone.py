"""Runs any transformers causal LM through forward hooks: the fallback for what PackedBackbone cannot run.

Prompts are padded, and a hook on each block reports its hidden states. It is slower, but makes no assumptions about
the model's internals.
"""

# B prompts in a batch, S tokens of the longest, T tokens of all, D hidden size

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefill_router.encoder.pack import Pack, Visit

_Modules = tuple[Any, nn.ModuleList]  # a backbone and its blocks


class HookedBackbone:
    """A transformers model with hooks during a run. Threads may share it: each run has the modules to itself.

    The modules are copied for threads that run at the same time, because hooks belong to a module and some families
    keep states in modules. All copies share the weights.
    """

    is_mixed = True  # whether a batch may mix lengths, that is, whether padding leaves states unchanged
    has_embedding = True  # whether hidden state 0 is the embedding; in Mamba it is the first block's output

    def __init__(self, backbone: Any, blocks: nn.ModuleList) -> None:
        self.backbone, self.blocks = backbone, blocks
        self._lending = threading.Lock()
        self._idle: list[_Modules] = [(backbone, blocks)]  # that no thread is running, never empty

    @property
    def device(self) -> torch.device:
        return next(iter(self.backbone.parameters())).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.backbone.parameters())).dtype  # type: ignore[no-any-return]

    def run(self, pack: Pack, visit: Visit, deepest: int) -> None:
        """Does what `PackedBackbone.run` does, for packs without a prefix."""
        # Prompts are right-padded: under causal attention no real token sees the padding, so no attention mask is
        # needed, and any token id will do.
        padded = nn.utils.rnn.pad_sequence(list(torch.split(pack.ids, pack.lengths)), batch_first=True)
        columns = torch.arange(padded.shape[1], device=padded.device)
        is_real = columns < torch.tensor(pack.lengths, device=padded.device)[:, None]
        rows = is_real.flatten().nonzero()[:, 0]

        def visit_packed(layer: int, states_BSD: Tensor) -> None:
            visit(layer, states_BSD.flatten(0, 1).index_select(0, rows.to(states_BSD.device)))

        with self._own_modules() as (backbone, blocks), self._visiting(blocks, visit_packed, deepest):
            final = backbone(input_ids=padded, use_cache=False).last_hidden_state
            # The last layer is taken after the final norm, as in transformers' `hidden_states`.
            visit_packed(len(blocks), final)

    @contextmanager
    def _own_modules(self) -> Iterator[_Modules]:
        """Lends modules that no other thread is running."""
        with self._lending:
            modules = self._idle.pop()
            if not self._idle:  # copied before a run, whose hooks and states belong to one thread
                self._idle.append(_sharing_weights(*modules))
        try:
            yield modules
        finally:
            self._idle.append(modules)

    @contextmanager
    def _visiting(self, blocks: nn.ModuleList, visit: Visit, deepest: int) -> Iterator[None]:
        """Installs hooks that call `visit(layer, states)` at each layer but the last, and end the pass at `deepest`."""

        def reached(layer: int, states_BSD: Tensor) -> None:
            visit(layer, states_BSD)
            if layer == deepest:
                raise DeepestLayerReached

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached(0, args[0] if args else kwargs["hidden_states"])

        def after(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
            reached(layer, states_of(output))

        hooks = []
        layers = list(enumerate(blocks))
        if self.has_embedding:
            hooks.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            layers = [(i + 1, block) for i, block in layers[:-1]]
        hooks += [block.register_forward_hook(partial(after, layer)) for layer, block in layers]
        try:
            yield
        except DeepestLayerReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()


def _sharing_weights(backbone: Any, blocks: nn.ModuleList) -> _Modules:
    """Copies the modules, but not their tensors."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    return copy.deepcopy((backbone, blocks), shared)


def states_of(output: Any) -> Tensor:
    """Returns the hidden states from a block's output."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


class DeepestLayerReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass after the deepest requested layer."""
