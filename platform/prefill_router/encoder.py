"""The encoder: a small causal LM that reads prompts through prefill alone.

It runs the backbone without its LM head, stops after the deepest layer asked for, and pools each layer inside the
forward pass, so that no layer's full states outlive the layer.
"""

# B prompts in a batch, S tokens, D hidden size, N prompts

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from prefill_router import checkpoint
from prefill_router.batching import token_budget_batches
from prefill_router.config import StrictModel
from prefill_router.corpus import Prompt
from prefill_router.errors import UserError
from prefill_router.schema import NUM_TOKENS, POOLINGS, ActivationColumn, Pooling, activation_columns

log = logging.getLogger(__name__)

# Raised whenever the same encoder would give other activations than before: it is part of the fingerprint.
ENCODING_VERSION = 1

BUDGET_TOKENS = {"cpu": 1024, "cuda": 32768}  # padded tokens in a batch
_FLOAT16_MAX = float(np.finfo(np.float16).max)

DType = Literal["bfloat16", "float32"]


class EncoderSpec(StrictModel):
    """What a user may choose of an encoder; what is left None is resolved when it is loaded."""

    model: str = Field(min_length=1, description="Hub id, directory, or package:NAME")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model")
    dtype: DType | None = Field(None, description="bfloat16 where the hardware is good at it, otherwise float32")
    max_tokens: int = Field(4096, ge=2, description="Longer prompts lose their middle")


class EncoderIdentity(StrictModel):
    """A loaded encoder, described so that it can be loaded again and told from any other."""

    spec: EncoderSpec
    num_layers: int
    hidden_size: int
    fingerprint: str


@dataclass(frozen=True)
class Tokens:
    """Tokenised prompts: what the encoder reads, and how long each was before it was cut."""

    ids: list[list[int]]
    full_lengths: NDArray[np.int32]  # (N,) tokens before truncation

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        return np.array([len(ids) for ids in self.ids], np.int32)

    @property
    def is_truncated(self) -> NDArray[np.bool_]:
        """(N,): was the prompt's middle cut?"""
        return self.num_tokens < self.full_lengths

    @property
    def num_truncated(self) -> int:
        return int(self.is_truncated.sum())


class PrefillEncoder:
    """A causal LM as an encoder. Make one with `PrefillEncoder.load`. Threads may share it: they take turns."""

    def __init__(self, backbone: nn.Module, tokenizer: Any, spec: EncoderSpec, weights_id: str) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self.blocks = _find_blocks(backbone)
        config = _text_config(backbone)
        self.num_layers, self.hidden_size = len(self.blocks), int(config.hidden_size)
        context = getattr(config, "max_position_embeddings", None)
        self.spec = spec.model_copy(update={"max_tokens": min(spec.max_tokens, context or spec.max_tokens)})
        self.fingerprint = _fingerprint(self.spec, weights_id, config, tokenizer)
        self._lock = threading.Lock()  # one forward pass at a time: each hangs its own hooks into the blocks

    @classmethod
    def load(cls, spec: str | EncoderSpec, device: str | None = None) -> PrefillEncoder:
        """Loads the encoder on `device`: CUDA when there is one, otherwise the CPU.

        Raises UserError where there is no such model, or it is no causal LM.
        """
        spec = EncoderSpec(model=spec) if isinstance(spec, str) else spec
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        spec = spec.model_copy(update={"dtype": spec.dtype or preferred_dtype(device)})
        loaded = checkpoint.load_causal_lm(spec.model, spec.revision, getattr(torch, str(spec.dtype)))
        spec = spec.model_copy(update={"revision": loaded.revision})
        # The base model is the backbone without the LM head, whose logits nobody needs.
        backbone = loaded.model.base_model.eval().requires_grad_(False)
        _check_causal(backbone, spec.model)
        return cls(backbone.to(device), loaded.tokenizer, spec, loaded.weights_id)

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(
            spec=self.spec, num_layers=self.num_layers, hidden_size=self.hidden_size, fingerprint=self.fingerprint
        )

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def encode(
        self,
        prompts: Sequence[Prompt],
        layers: Literal["all"] | Sequence[int] = "all",
        pooling: Sequence[Pooling] = POOLINGS,
    ) -> dict[str, NDArray[Any]]:
        """Prefill activations of `prompts`, each a bare prompt or a list of messages.

        Returns a float16 array (N, D) for each layer and pooling, named like `last_012`, and `num_tokens` int32 (N,),
        the tokens that were read. A prompt longer than `max_tokens` is cut as `tokenize` says, and a warning counts
        such prompts. Values beyond float16's range are clamped to it, with a warning. Raises UserError for a layer or
        pooling that the encoder does not have.
        """
        tokens = self.tokenize(prompts)
        if tokens.num_truncated:
            log.warning("%d of %d prompts cut to %d tokens", tokens.num_truncated, len(prompts), self.spec.max_tokens)
        return self.forward(tokens, self.columns(layers, pooling))

    def columns(self, layers: Literal["all"] | Sequence[int], pooling: Sequence[Pooling]) -> list[ActivationColumn]:
        """The activation columns of `layers` (indices in `hidden_states`, 0 to num_layers) and `pooling`."""
        indices = range(self.num_layers + 1) if layers == "all" else layers
        for layer in indices:
            if not 0 <= layer <= self.num_layers:
                raise UserError(f"layer {layer} is out of range: {self.spec.model} has 0 to {self.num_layers}")
        for name in pooling:
            if name not in POOLINGS:
                raise UserError(f'pooling "{name}" is unknown: use {" or ".join(POOLINGS)}')
        columns = activation_columns(indices, pooling)
        if not columns:
            raise UserError("no layer or no pooling was asked for")
        return columns

    def render(self, prompt: Prompt) -> str:
        """The prompt as the model's own chat template renders it, ending in the generation prompt.

        A bare prompt is one user message. A tokenizer without a chat template reads a bare prompt as it is.
        """
        if self.tokenizer.chat_template is None:
            if isinstance(prompt, str):
                return prompt
            raise UserError(f"{self.spec.model} has no chat template, so it cannot read messages: give bare prompts")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise UserError(f"the chat template of {self.spec.model} refuses the messages: {error}") from None
        return str(text)

    def tokenize(self, prompts: Sequence[Prompt]) -> Tokens:
        """Token ids of each prompt; special tokens come from the chat template, or, without one, from the tokenizer.

        A prompt longer than `max_tokens` keeps its first half and its last half of them: its middle is cut, so that
        the template's opening and the generation prompt stay.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of prompts, not one string")
        if not prompts:
            return Tokens([], np.zeros(0, np.int32))
        texts = [self.render(prompt) for prompt in prompts]
        add_special_tokens = self.tokenizer.chat_template is None
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        for prompt_ids in ids:
            if not prompt_ids:
                raise UserError("a prompt has no tokens: it is empty, and the model has no chat template")
        lengths = np.array([len(i) for i in ids], np.int32)
        return Tokens([_cut_middle(i, self.spec.max_tokens) for i in ids], lengths)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, columns: Sequence[ActivationColumn]) -> dict[str, NDArray[Any]]:
        """Runs the prefill of `tokens` and returns what `encode` does, for exactly `columns`."""
        lengths = tokens.num_tokens
        pooled = {c.name: np.empty((len(lengths), self.hidden_size), np.float16) for c in columns}
        for batch in token_budget_batches(lengths.tolist(), BUDGET_TOKENS[self.device.type]):
            for name, values in self._forward_batch([tokens.ids[i] for i in batch], columns).items():
                pooled[name][batch] = values.cpu().numpy()
        saturated = sum(int((np.abs(values) == _FLOAT16_MAX).sum()) for values in pooled.values())
        if saturated:
            log.warning("%d activations beyond float16's range were clamped to it", saturated)
        return {**pooled, NUM_TOKENS: lengths}

    def _forward_batch(self, ids: list[list[int]], columns: Sequence[ActivationColumn]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(i) for i in ids], device=self.device)
        # Padding stands right of every prompt: under causal attention no real token ever sees it, so that the batch
        # needs no attention mask. Any id will do.
        padded = nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)
        pooled: dict[str, Tensor] = {}

        def pool(layer: int, states_BSD: Tensor) -> None:
            for column in columns:
                if column.layer == layer:
                    pooled[column.name] = _to_float16(_POOL[column.pooling](states_BSD, lengths))

        deepest = max(column.layer for column in columns)
        with self._lock, self._visiting(pool, deepest):
            final = self.backbone(input_ids=padded.to(self.device), use_cache=False).last_hidden_state
            # The last layer is taken after the final norm, as transformers does.
            pool(self.num_layers, final)
        return pooled

    @contextmanager
    def _visiting(self, visit: Callable[[int, Tensor], None], deepest: int) -> Iterator[None]:
        """Calls `visit(layer, states)` at each layer but the last of a forward pass, and ends it at `deepest`."""

        def reached(layer: int, states_BSD: Tensor) -> None:
            visit(layer, states_BSD)
            if layer == deepest:
                raise _DeepestLayerReached

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached(0, args[0] if args else kwargs["hidden_states"])

        def after(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
            reached(layer, output[0] if isinstance(output, tuple) else output)

        hooks = [self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(partial(after, i + 1)) for i, block in enumerate(self.blocks[:-1])]
        try:
            yield
        except _DeepestLayerReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()


class _DeepestLayerReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass whose later layers nobody asked for."""


def preferred_dtype(device: str) -> DType:
    """bfloat16 where the hardware multiplies it natively, otherwise float32."""
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def _text_config(backbone: Any) -> Any:
    """The config of the language model, where the backbone has others beside it."""
    return backbone.config.get_text_config()


@torch.inference_mode()
def _check_causal(backbone: Any, model: str) -> None:
    """Raises UserError where a token sees the ones after it: batches could not be padded, nor prefixes shared."""
    first, second = (
        backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, 0] for ids in ([1, 2], [1, 3])
    )
    if not torch.equal(first, second):
        raise UserError(f"encoder {model}: is no causal LM: its tokens see the ones after them")


def _find_blocks(backbone: nn.Module) -> nn.ModuleList:
    depth = _text_config(backbone).num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"{type(backbone).__name__} has no list of {depth} blocks: it cannot serve as an encoder")


def _architecture(config: Any) -> dict[str, Any]:
    """What of a model's config changes its activations: all that is not default, but where it came from."""
    incidental = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
    return {key: value for key, value in config.to_diff_dict().items() if key not in incidental}


def _fingerprint(spec: EncoderSpec, weights_id: str, config: Any, tokenizer: Any) -> str:
    """A hash of all that changes activations, except the device."""
    parts = {
        "encoding_version": ENCODING_VERSION,
        "weights": weights_id,
        "config": _architecture(config),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template": tokenizer.chat_template,
        "dtype": spec.dtype,
        "max_tokens": spec.max_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _cut_middle(ids: list[int], max_tokens: int) -> list[int]:
    if len(ids) <= max_tokens:
        return ids
    tail = max_tokens // 2
    return ids[: max_tokens - tail] + ids[len(ids) - tail :]


def _pool_last(states_BSD: Tensor, lengths: Tensor) -> Tensor:
    rows = torch.arange(len(lengths), device=states_BSD.device)
    return states_BSD[rows, lengths - 1].float()


def _pool_mean(states_BSD: Tensor, lengths: Tensor) -> Tensor:
    positions = torch.arange(states_BSD.shape[1], device=states_BSD.device)
    weights_BS = (positions < lengths[:, None]).float() / lengths[:, None]
    return torch.bmm(weights_BS[:, None], states_BSD.float())[:, 0]


_POOL = {"last": _pool_last, "mean": _pool_mean}


def _to_float16(values: Tensor) -> Tensor:
    return values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16)
