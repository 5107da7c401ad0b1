"""The encoder: a small causal LM that reads prompts through prefill alone.

Prompts of similar length are packed together, what they share at their beginning is computed once, the pass ends after
the deepest layer asked for, and each layer is pooled as it comes, so that no layer's full states outlive it.
"""

# B prompts in a pack, D hidden size, N prompts, C columns

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from prefill_router.common.errors import UserError
from prefill_router.common.schema import NUM_TOKENS, POOLINGS, ActivationColumn, MeanOver, Pooling, activation_columns
from prefill_router.common.validation import IsoDate, JsonObject, StrictModel
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint
from prefill_router.encoder.architecture import (
    architecture,
    block_cost,
    context_tokens,
    find_blocks,
    has_windows,
    is_the_same_at_any_length,
    selects_keys,
    short_rope_tokens,
    text_config,
)
from prefill_router.encoder.attention import KeyValue
from prefill_router.encoder.batching import token_budget_batches
from prefill_router.encoder.decoder import Decoder, Pack
from prefill_router.encoder.hardware import DType, bound_kernel_caches, preferred_dtype
from prefill_router.encoder.hooked_backbone import HookedBackbone
from prefill_router.encoder.packed_backbone import PackedBackbone
from prefill_router.encoder.pooling import FLOAT16_MAX, Pooler, PrefixSums
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.prefix_cache import Ids, Prefix, PrefixMemory
from prefill_router.encoder.prefixes import PrefixGroup, shared_prefixes
from prefill_router.encoder.tokenization import PromptTokenizer, Tokens
from prefill_router.encoder.verification import ExpectedStates, check_causal, expected_states

log = logging.getLogger(__name__)

# Raised whenever the same encoder would give other activations than before: it is part of the fingerprint.
ENCODING_VERSION = 4

# Tokens in a pack: on a CPU, what stays in its cache; on a GPU, what keeps it busy.
BUDGET_TOKENS = {"cpu": 1024, "cuda": 32768}


class EncoderSpec(StrictModel):
    """What a user may choose of an encoder; what is left None is resolved when it is loaded."""

    model: str = Field(min_length=1, description="Hub id, directory, or package:NAME")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model")
    dtype: DType | None = Field(None, description="bfloat16 where the hardware is good at it, otherwise float32")
    max_tokens: int = Field(4096, ge=2, description="Longer prompts lose their middle")
    mean_over: MeanOver = Field("all", description="Tokens that the mean pooling takes")
    template_arguments: JsonObject = Field({}, description="Passed to the chat template")
    template_date: IsoDate = Field("2026-01-01", description="Today, for chat templates that ask for the date")


class EncoderIdentity(StrictModel):
    """A loaded encoder, described so that it can be loaded again and told from any other."""

    spec: EncoderSpec
    num_layers: int
    hidden_size: int
    fingerprint: str

    def columns(self, layers: Literal["all"] | Sequence[int], pooling: Sequence[Pooling]) -> list[ActivationColumn]:
        """The activation columns of `layers` (indices in `hidden_states`, 0 to num_layers) and `pooling`."""
        indices = range(self.num_layers + 1) if layers == "all" else layers
        _check_layers(indices, self.num_layers, self.spec.model)
        for name in pooling:
            if name not in POOLINGS:
                raise UserError(f'pooling "{name}" is unknown: use {" or ".join(POOLINGS)}')
        columns = activation_columns(indices, pooling)
        if not columns:
            raise UserError("no layer or no pooling was asked for")
        return columns


class EncodedPrompts(NamedTuple):
    """Prompts that were read: their columns as of `PrefillEncoder.encode`, the work, and their lengths uncut."""

    encoded: dict[str, NDArray[Any]]
    work: Work
    full_lengths: NDArray[np.int32]  # (N,)

    @property
    def is_truncated(self) -> NDArray[np.bool_]:
        """(N,): was the prompt's middle cut?"""
        return np.asarray(self.encoded[NUM_TOKENS] < self.full_lengths)


class PrefillEncoder:
    """A causal LM as an encoder. Make one with `PrefillEncoder.load`.

    Threads may share it. They take turns, unless each has one core to itself (`torch.set_num_threads(1)`).
    """

    def __init__(self, backbone: Any, tokenizer: Any, spec: EncoderSpec, weights_id: str) -> None:
        config = text_config(backbone)
        context = context_tokens(config)
        self.spec = spec.model_copy(update={"max_tokens": min(spec.max_tokens, context or spec.max_tokens)})
        options = (self.spec.max_tokens, date.fromisoformat(spec.template_date), spec.template_arguments)
        self.tokenizer, self._prompts = tokenizer, PromptTokenizer(tokenizer, spec.model, *options)
        self.fingerprint = _fingerprint(self.spec, weights_id, config, self._prompts)
        blocks = find_blocks(backbone)
        self.num_layers, self.hidden_size = len(blocks), int(config.hidden_size)
        self.cost = block_cost(blocks[0], config)
        self._short_rope_tokens = short_rope_tokens(config) or self.spec.max_tokens
        decoder = Decoder.from_transformers(backbone, self.spec.max_tokens)
        self.backbone: Decoder | HookedBackbone = decoder or HookedBackbone(backbone, blocks)
        self.device, self.dtype = self.backbone.device, getattr(torch, str(spec.dtype))
        self.memory: PrefixMemory | None = None  # give it one, where prompts come one by one
        self._computing = threading.Lock()

    @classmethod
    def load(cls, spec: str | EncoderSpec, device: str | None = None) -> PrefillEncoder:
        """Loads the encoder on `device`: CUDA when there is one, otherwise the CPU.

        Raises UserError where there is no such model, or it is no causal LM.
        """
        spec = EncoderSpec(model=spec) if isinstance(spec, str) else spec
        bound_kernel_caches()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        spec = spec.model_copy(update={"dtype": spec.dtype or preferred_dtype(device)})
        loaded = checkpoint.load_causal_lm(spec.model, spec.revision, getattr(torch, str(spec.dtype)))
        spec = spec.model_copy(update={"revision": loaded.revision})
        with checkpoint.load_errors(spec.model):
            backbone = loaded.backbone.to(device)
            encoder = cls(backbone, loaded.tokenizer, spec, loaded.weights_id)
            if encoder.device.type != "meta":  # which computes nothing
                encoder._check(backbone)
        return encoder

    def _check(self, backbone: Any) -> None:
        """Raises ValueError unless prompts are read as `backbone`, a model of transformers, reads them."""
        expected = expected_states(backbone, self.num_layers, self.hidden_size, self.spec.max_tokens)
        check_causal(backbone, self.spec.max_tokens)
        if isinstance(self.backbone, Decoder):
            expected.check(self.backbone.run)
            return
        if not expected.holds(self.backbone.run):
            self.backbone.has_embedding = False
            expected.check(self.backbone.run)
        is_selective = selects_keys(text_config(backbone))
        self.backbone.is_mixed = not is_selective and expected.holds_in_company(self.backbone.run)
        self.backbone = _packed(backbone, self.backbone, expected) or self.backbone

    @property
    def name(self) -> str:
        """Where it was loaded from."""
        return self.spec.model

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(
            spec=self.spec, num_layers=self.num_layers, hidden_size=self.hidden_size, fingerprint=self.fingerprint
        )

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
        encoded, work = self.forward(tokens, self.columns(layers, pooling))
        if work.clamped:
            log.warning("%d activations beyond float16's range were clamped to it", work.clamped)
        return encoded

    def columns(self, layers: Literal["all"] | Sequence[int], pooling: Sequence[Pooling]) -> list[ActivationColumn]:
        return self.identity.columns(layers, pooling)

    def read(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> EncodedPrompts:
        """Tokenises and runs the prefill: `encode` for jobs, which count what it logs."""
        tokens = self.tokenize(prompts)
        return EncodedPrompts(*self.forward(tokens, columns), tokens.full_lengths)

    def render(self, prompt: Prompt) -> str:
        """The text that is tokenised: see `PromptTokenizer.render`."""
        return self._prompts.render(prompt)

    def tokenize(self, prompts: Sequence[Prompt]) -> Tokens:
        """Token ids of each prompt, at most `max_tokens`: see `PromptTokenizer.tokenize`."""
        return self._prompts.tokenize(prompts)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, columns: Sequence[ActivationColumn]) -> tuple[dict[str, NDArray[Any]], Work]:
        """Runs the prefill of `tokens`; returns what `encode` does, for exactly `columns`, and how much work it was."""
        lengths = tokens.num_tokens
        results = _Results(columns, len(lengths), self.hidden_size)
        work = Work(prompts=len(lengths), tokens=int(lengths.sum()))
        with self._turn():
            started = time.perf_counter()
            streams = [self._begin(tokens, group, columns) for group in self._prefix_groups(tokens)]
            packs = [(stream, batch) for stream in streams for batch in self._batches(stream)]
            for pack_work in self._each(partial(self._forward_pack, results), packs):
                work += pack_work
            encoded: dict[str, NDArray[Any]] = results.collect()
            work += Work(seconds=time.perf_counter() - started)
        work = sum((stream.work for stream in streams), work)
        clamped = sum(int((np.abs(values) == FLOAT16_MAX).sum()) for values in encoded.values())
        return {**encoded, NUM_TOKENS: lengths}, work + Work(clamped=clamped)

    @property
    def runs_side_by_side(self) -> bool:
        """May threads with a core each call it at the same time?"""
        return self.device.type == "cpu" and self.backbone.is_packed

    def _turn(self) -> AbstractContextManager[Any]:
        """Two calls that use all cores would only wait for each other, and hooks hang in a model for one call."""
        return nullcontext() if self.runs_side_by_side and torch.get_num_threads() == 1 else self._computing

    def _prefix_groups(self, tokens: Tokens) -> list[PrefixGroup]:
        if self.backbone.is_packed:
            if self.memory is not None:
                return self.memory.groups(tokens.ids)
            # A group of its own is worth its smaller packs where it saves a good part of one.
            return shared_prefixes(tokens.ids, min_saved_tokens=self.budget_tokens // 4)
        # Each kind by itself: a batch takes its frequencies by its longest prompt.
        kinds: tuple[list[int], list[int]] = ([], [])
        for i, length in enumerate(tokens.num_tokens.tolist()):
            kinds[length > self._short_rope_tokens].append(i)
        return [PrefixGroup(0, kind) for kind in kinds if kind]

    @property
    def budget_tokens(self) -> int:
        """Tokens in a pack: more at once are not faster."""
        return BUDGET_TOKENS.get(self.device.type, BUDGET_TOKENS["cpu"])

    def _begin(self, tokens: Tokens, group: PrefixGroup, columns: Sequence[ActivationColumn]) -> _Stream:
        """Computes what the prompts of a group share."""
        own = [tokens.ids[i][group.num_tokens :] for i in group.prompts]
        if not group.num_tokens or not isinstance(self.backbone, Decoder | PackedBackbone):
            return _Stream(group, own, columns)
        shared = tuple(tokens.ids[group.prompts[0]][: group.num_tokens])
        deepest = max(column.layer for column in columns)
        known = self.memory.longest(shared, deepest) if self.memory is not None else None
        if known is not None and len(known.ids) == len(shared):
            return _Stream(group, own, columns, known)
        prefix, work = self._prefix(self.backbone, shared, deepest, known)
        if self.memory is not None:
            self.memory.keep(prefix)
        return _Stream(group, own, columns, prefix, work)

    def _prefix(
        self, backbone: Decoder | PackedBackbone, ids: Ids, deepest: int, known: Prefix | None
    ) -> tuple[Prefix, Work]:
        """Computes a prefix, or what of it is not known."""
        first = len(known.ids) if known is not None else 0
        sums = PrefixSums(len(ids), self.spec.mean_over == "after_first", known.sums if known is not None else None)
        pack = Pack.of([ids[first:]], self.device, known.keys_and_values if known is not None else None)
        own: list[KeyValue] = []
        backbone.run(pack, sums.visit, deepest, keep=own)
        before = [known.keys_and_values[:deepest]] if known is not None else []
        # Joined or copied: what `run` keeps are views of tensors several times as large.
        layers = zip(*before, own, strict=True)
        joined = [(torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])) for parts in layers]
        return Prefix(ids, joined, sums), self._work([len(ids) - first], first, deepest)

    def _batches(self, stream: _Stream) -> Iterator[NDArray[np.int64]]:
        lengths = [len(ids) for ids in stream.own]
        if isinstance(self.backbone, Decoder | PackedBackbone):
            return token_budget_batches(lengths, self.budget_tokens, is_padded=False)
        return token_budget_batches(lengths, self.budget_tokens, is_mixed=self.backbone.is_mixed)

    def _each(self, run: Callable[[_Pair], Work], packs: Sequence[_Pair]) -> Iterator[Work]:
        """Runs the packs: on a CPU each core its own, which beats all cores on one by what only one of them can do."""
        threads = torch.get_num_threads()
        if self.device.type != "cpu" or min(threads, len(packs)) < 2 or not self.backbone.is_packed:
            return map(run, packs)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return iter(list(pool.map(run, packs)))
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _forward_pack(self, results: _Results, pair: _Pair) -> Work:
        stream, batch = pair
        prefix = stream.prefix
        pack = Pack.of([stream.own[i] for i in batch], self.device, prefix.keys_and_values if prefix else None)
        leave_out_first = self.spec.mean_over == "after_first"
        pooler = Pooler(stream.columns, pack.lengths, self.device, leave_out_first, prefix.sums if prefix else None)
        deepest = max(column.layer for column in stream.columns)
        self.backbone.run(pack, pooler.visit, deepest)
        results.put(np.array(stream.group.prompts)[batch], pooler.result())
        return self._work(pack.lengths, stream.group.num_tokens, deepest)

    def _work(self, lengths: list[int], prefix_tokens: int, num_blocks: int) -> Work:
        padded = 0 if self.backbone.is_packed else max(lengths) * len(lengths) - sum(lengths)
        flops = self.cost.flops(lengths, prefix_tokens, num_blocks)
        return Work(computed_tokens=sum(lengths), padded_tokens=padded, flops=flops)


@dataclass(frozen=True)
class _Stream:
    """Prompts that continue one prefix, or none: what each has of its own, and what is known of the prefix."""

    group: PrefixGroup
    own: list[list[int]]
    columns: Sequence[ActivationColumn]
    prefix: Prefix | None = None
    work: Work = field(default_factory=Work)


_Pair = tuple[_Stream, NDArray[np.int64]]  # and which of its prompts make up a pack


class _Results:
    """Activations on their way to the host: each pack is copied while the device computes the next one."""

    def __init__(self, columns: Sequence[ActivationColumn], num_prompts: int, hidden_size: int) -> None:
        self.columns = columns
        self.values_CND = np.empty((len(columns), num_prompts, hidden_size), np.float16)
        self._copying: tuple[NDArray[np.int64], Tensor, torch.cuda.Event] | None = None

    def put(self, prompts: NDArray[np.int64], pooled_CBD: Tensor) -> None:
        if not pooled_CBD.is_cuda:
            self.values_CND[:, prompts] = pooled_CBD.numpy()
            return
        host = torch.empty(pooled_CBD.shape, dtype=pooled_CBD.dtype, pin_memory=True)
        host.copy_(pooled_CBD, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._take()
        self._copying = (prompts, host, done)

    def collect(self) -> dict[str, NDArray[np.float16]]:
        self._take()
        return {column.name: values for column, values in zip(self.columns, self.values_CND, strict=True)}

    def _take(self) -> None:
        if self._copying is None:
            return
        prompts, pooled_CBD, done = self._copying
        done.synchronize()
        self.values_CND[:, prompts] = pooled_CBD.numpy()
        self._copying = None


def _packed(backbone: Any, hooked: HookedBackbone, expected: ExpectedStates) -> PackedBackbone | None:
    """`backbone` over packs, if it gives the same so; otherwise it stays as it was."""
    config, attention = text_config(backbone), backbone.config._attn_implementation
    if not is_the_same_at_any_length(config):
        return None
    try:
        packed = PackedBackbone(backbone, hooked.blocks)
        checks = (expected.holds, expected.holds_in_company, expected.holds_after_prefix)
        is_exact = all(check(packed.run) for check in checks)
        if is_exact and (packed.windows - {None} or not has_windows(config)):
            return packed
    except Exception as error:  # models raise what they like at what they do not expect
        log.debug("%s cannot be packed: %s", type(backbone).__name__, error)
    backbone.set_attn_implementation(attention)
    return None


def check(spec: EncoderSpec, layers: Sequence[int] = ()) -> None:
    """Raises UserError where `PrefillEncoder.load` would fail, or lack one of `layers`; no weight is read."""
    config = checkpoint.check_causal_lm(spec.model, spec.revision)
    _check_layers(layers, config.get_text_config().num_hidden_layers, spec.model)


def _check_layers(layers: Iterable[int], num_layers: int, model: str) -> None:
    for layer in layers:
        if not 0 <= layer <= num_layers:
            raise UserError(f"layer {layer} is out of range: {model} has 0 to {num_layers}")


def _fingerprint(spec: EncoderSpec, weights_id: str, config: Any, tokenizer: PromptTokenizer) -> str:
    """A hash of all that changes activations, except the device."""
    parts = {
        "encoding_version": ENCODING_VERSION,
        "weights": weights_id,
        "config": architecture(config),
        **tokenizer.digest,
        "dtype": spec.dtype,
        "max_tokens": spec.max_tokens,
        "mean_over": spec.mean_over,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
