"""Any causal LM of transformers as it is: the way for architectures that neither `decoder` nor `packed` can run.

Prompts are padded, and hooks hand out each block's states. Slower, but it needs to know nothing of the model's inside.
"""

# B prompts in a batch, S tokens of the longest, T tokens of all, D hidden size

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefill_router.encoder.decoder import Pack, Visit


class HookedBackbone:
    """Runs one pack at a time: its hooks hang in the model while it runs."""

    is_packed = False
    is_mixed = True  # may prompts of several lengths be padded, or does padding change what they give?
    has_embedding = True  # is the first hidden state the embedding, or, as in Mamba, what the first block gives?

    def __init__(self, backbone: Any, blocks: nn.ModuleList) -> None:
        self.backbone, self.blocks = backbone, blocks

    @property
    def device(self) -> torch.device:
        return next(iter(self.backbone.parameters())).device  # type: ignore[no-any-return]

    def run(self, pack: Pack, visit: Visit, deepest: int) -> None:
        """As `Decoder.run`, for packs without a prefix."""
        # Padding stands right of every prompt: under causal attention no real token ever sees it, so that the batch
        # needs no attention mask. Any id will do.
        padded = nn.utils.rnn.pad_sequence(list(torch.split(pack.ids, pack.lengths)), batch_first=True)
        columns = torch.arange(padded.shape[1], device=padded.device)
        is_real = columns < torch.tensor(pack.lengths, device=padded.device)[:, None]
        rows = is_real.flatten().nonzero()[:, 0]

        def visit_packed(layer: int, states_BSD: Tensor) -> None:
            visit(layer, states_BSD.flatten(0, 1).index_select(0, rows))

        with self._visiting(visit_packed, deepest):
            final = self.backbone(input_ids=padded, use_cache=False).last_hidden_state
            # The last layer is taken after the final norm, as transformers does.
            visit_packed(len(self.blocks), final)

    @contextmanager
    def _visiting(self, visit: Visit, deepest: int) -> Iterator[None]:
        """Calls `visit(layer, states)` at each layer but the last of a forward pass, and ends it at `deepest`."""

        def reached(layer: int, states_BSD: Tensor) -> None:
            visit(layer, states_BSD)
            if layer == deepest:
                raise DeepestLayerReached

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached(0, args[0] if args else kwargs["hidden_states"])

        def after(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
            reached(layer, states_of(output))

        hooks = []
        blocks = list(enumerate(self.blocks))
        if self.has_embedding:
            hooks.append(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            blocks = [(i + 1, block) for i, block in blocks[:-1]]
        hooks += [block.register_forward_hook(partial(after, layer)) for layer, block in blocks]
        try:
            yield
        except DeepestLayerReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()


def states_of(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


class DeepestLayerReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass whose later layers nobody asked for."""
