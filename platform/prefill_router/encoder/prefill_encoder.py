"""The encoder: computes pooled prefill activations of prompts with a small causal LM.

It packs prompts together, computes shared prefixes once, ends the forward pass after the deepest requested layer, and
pools each layer as it is reached, so that no layer's full states are kept.
"""

# B prompts in a pack, D hidden size, N prompts, C columns

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefill_router.common.console import doing
from prefill_router.common.schema import NUM_TOKENS, POOLINGS, ActivationColumn, Pooling
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint, placement
from prefill_router.encoder.activation_scales import activation_scales
from prefill_router.encoder.architecture import (
    block_cost,
    context_tokens,
    find_blocks,
    has_windows,
    is_length_independent,
    selects_keys,
    short_rope_tokens,
    text_config,
)
from prefill_router.encoder.attention import KeyValue
from prefill_router.encoder.batching import token_budget_batches
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec, fingerprint
from prefill_router.encoder.fused_modules import fuse
from prefill_router.encoder.hardware import bound_kernel_caches, keep_freed_memory, preferred_dtype
from prefill_router.encoder.hooked_backbone import HookedBackbone
from prefill_router.encoder.pack import Pack
from prefill_router.encoder.packed_backbone import PackedBackbone
from prefill_router.encoder.pooling import FLOAT16_MAX, Pooler, PrefixSums
from prefill_router.encoder.prefill_work import Work
from prefill_router.encoder.prefix_cache import Ids, Prefix, PrefixCache
from prefill_router.encoder.prefixes import PrefixGroup, shared_prefixes
from prefill_router.encoder.tokenization import PromptTokenizer, Tokens
from prefill_router.encoder.verification import ExpectedStates, check_causal, expected_states

log = logging.getLogger(__name__)

# Tokens per pack: as many as fit in a CPU's cache, or as keep a GPU busy.
BUDGET_TOKENS = {"cpu": 1024, "cuda": 32768}


class EncodedPrompts(NamedTuple):
    """Encoded prompts: columns as from `PrefillEncoder.encode`, the work done, and lengths before truncation."""

    encoded: dict[str, NDArray[Any]]
    work: Work
    full_lengths: NDArray[np.int32]  # (N,)

    @property
    def is_truncated(self) -> NDArray[np.bool_]:
        """(N,) whether each prompt's middle was cut."""
        return np.asarray(self.encoded[NUM_TOKENS] < self.full_lengths)


class PrefillEncoder:
    """A causal LM as an encoder. Create one with `PrefillEncoder.load`.

    Threads may share it. Their calls run one at a time, unless each thread uses one core (`torch.set_num_threads(1)`).
    """

    def __init__(self, backbone: Any, tokenizer: Any, spec: EncoderSpec, weights_id: str, scales: list[int]) -> None:
        config = text_config(backbone)
        context = context_tokens(config)
        self.spec = spec.model_copy(update={"max_tokens": min(spec.max_tokens, context or spec.max_tokens)})
        options = (self.spec.max_tokens, date.fromisoformat(spec.template_date), spec.template_arguments)
        self.tokenizer, self._prompts = tokenizer, PromptTokenizer(tokenizer, spec.model, *options)
        self.scales = scales  # divisors of each layer's states: see `activation_scales`
        self.fingerprint = fingerprint(self.spec, weights_id, config, self._prompts, scales)
        blocks = find_blocks(backbone)
        self.num_layers, self.hidden_size = len(blocks), int(config.hidden_size)
        self.cost = block_cost(blocks[0], config)
        self._short_rope_tokens = short_rope_tokens(config) or self.spec.max_tokens
        self.backbone = HookedBackbone(backbone, blocks)
        self.device, self.dtype = self.backbone.device, getattr(torch, str(spec.dtype))
        self.devices = list(dict.fromkeys(weight.device for weight in backbone.parameters()))
        self.prefix_cache: PrefixCache | None = None  # set one if prompts arrive one at a time
        self._lock = threading.Lock()

    @classmethod
    @doing("loading the encoder")
    def load(cls, spec: str | EncoderSpec, device: str | None = None) -> PrefillEncoder:
        """Loads the encoder on `device`, by default CUDA if available, otherwise the CPU.

        On "cuda", a model that is larger than a GPU is divided over all GPUs of the process. Raises UserError if the
        model is too large, cannot be loaded or is not a causal LM.
        """
        spec = EncoderSpec(model=spec) if isinstance(spec, str) else spec
        bound_kernel_caches()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        spec = spec.model_copy(update={"dtype": spec.dtype or preferred_dtype(device)})
        loaded = checkpoint.load_causal_lm(spec.model, spec.revision, getattr(torch, str(spec.dtype)))
        spec = spec.model_copy(update={"revision": loaded.revision})
        with checkpoint.load_errors(spec.model):
            scales = activation_scales(loaded.backbone)
            pack_tokens = max(spec.max_tokens, _budget_tokens(device))
            backbone = placement.place(loaded.backbone, find_blocks(loaded.backbone), device, pack_tokens)
            encoder = cls(backbone, loaded.tokenizer, spec, loaded.weights_id, scales)
            if encoder.device.type != "meta":  # meta tensors hold no values to verify
                with placement.division_errors(encoder.devices):
                    encoder._verify(backbone)
        keep_freed_memory()
        return encoder

    def _verify(self, backbone: Any) -> None:
        """Compares activations with `backbone`, the transformers model, and replaces hooks by packs if possible.

        Raises ValueError if they differ.
        """
        expected = expected_states(backbone, self.num_layers, self.hidden_size, self.spec.max_tokens)
        check_causal(backbone, self.spec.max_tokens)
        if not expected.matches(self.backbone.run):
            self.backbone.has_embedding = False
            expected.check(self.backbone.run)
        is_selective = selects_keys(text_config(backbone))
        self.backbone.is_mixed = not is_selective and expected.matches_in_batch(self.backbone.run)
        self.backbone = _packed(backbone, self.backbone, expected) or self.backbone

    @property
    def name(self) -> str:
        """The hub id, directory or package that it was loaded from."""
        return self.spec.model

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(
            spec=self.spec,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            fingerprint=self.fingerprint,
            scales=self.scales,
        )

    def encode(
        self,
        prompts: Sequence[Prompt],
        layers: Literal["all"] | Sequence[int] = "all",
        pooling: Sequence[Pooling] = POOLINGS,
    ) -> dict[str, NDArray[Any]]:
        """Computes prefill activations of `prompts`, each a bare prompt or a list of messages.

        Returns a float16 array (N, D) for each layer and pooling, named like `last_012`, and `num_tokens` int32 (N,),
        the prompt lengths after truncation. The states of layer l are divided by `scales[l]`, unless `scales` is empty.
        Logs a warning with the number of prompts cut to `max_tokens`, and one with the number of values clamped to
        float16's range. Raises UserError for an unknown layer or pooling.
        """
        tokens = self.tokenize(prompts)
        if tokens.num_truncated:
            log.warning("%d of %d prompts cut to %d tokens", tokens.num_truncated, len(prompts), self.spec.max_tokens)
        encoded, work = self.forward(tokens, self.columns(layers, pooling))
        if work.clamped:
            log.warning("%d activations outside float16's range were clamped", work.clamped)
        return encoded

    def columns(self, layers: Literal["all"] | Sequence[int], pooling: Sequence[Pooling]) -> list[ActivationColumn]:
        return self.identity.columns(layers, pooling)

    def read(self, prompts: Sequence[Prompt], columns: Sequence[ActivationColumn]) -> EncodedPrompts:
        """Does what `encode` does for given columns, returning counts instead of logging warnings."""
        tokens = self.tokenize(prompts)
        return EncodedPrompts(*self.forward(tokens, columns), tokens.full_lengths)

    def render(self, prompt: Prompt) -> str:
        """Returns the text that is tokenised: see `PromptTokenizer.render`."""
        return self._prompts.render(prompt)

    def tokenize(self, prompts: Sequence[Prompt]) -> Tokens:
        """Returns each prompt's token ids, at most `max_tokens`: see `PromptTokenizer.tokenize`."""
        return self._prompts.tokenize(prompts)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, columns: Sequence[ActivationColumn]) -> tuple[dict[str, NDArray[Any]], Work]:
        """Runs the prefill of `tokens`. Returns the arrays of `encode` for exactly `columns`, and the work done."""
        lengths = tokens.num_tokens
        results = _Results(columns, len(lengths), self.hidden_size)
        work = Work(prompts=len(lengths), tokens=int(lengths.sum()))
        with self._exclusive():
            started = time.perf_counter()
            groups = [self._begin_group(tokens, group, columns) for group in self._prefix_groups(tokens)]
            packs = [(group, batch) for group in groups for batch in self._batches(group)]
            for pack_work in self._run_packs(partial(self._forward_pack, results), packs):
                work += pack_work
            encoded: dict[str, NDArray[Any]] = results.collect()
            work += Work(seconds=time.perf_counter() - started)
        work = sum((group.work for group in groups), work)
        clamped = sum(int((np.abs(values) == FLOAT16_MAX).sum()) for values in encoded.values())
        return {**encoded, NUM_TOKENS: lengths}, work + Work(clamped=clamped)

    @property
    def runs_side_by_side(self) -> bool:
        """Whether threads with one core each may call it at the same time."""
        return self.device.type == "cpu"

    def _exclusive(self) -> AbstractContextManager[Any]:
        """Returns the lock of a call, if it needs one: calls compete for cores."""
        return nullcontext() if self.runs_side_by_side and torch.get_num_threads() == 1 else self._lock

    def _prefix_groups(self, tokens: Tokens) -> list[PrefixGroup]:
        if isinstance(self.backbone, PackedBackbone):
            if self.prefix_cache is not None:
                return self.prefix_cache.groups(tokens.ids)
            # A separate group leads to smaller packs, so it has to save a good part of a pack.
            return shared_prefixes(tokens.ids, min_saved_tokens=self.budget_tokens // 4)
        # LongRoPE chooses the frequencies of a batch by its longest prompt: do not mix short and long prompts.
        kinds: tuple[list[int], list[int]] = ([], [])
        for i, length in enumerate(tokens.num_tokens.tolist()):
            kinds[length > self._short_rope_tokens].append(i)
        return [PrefixGroup(0, kind) for kind in kinds if kind]

    @property
    def budget_tokens(self) -> int:
        """Tokens per pack; larger packs are not faster."""
        return _budget_tokens(self.device.type)

    def _begin_group(self, tokens: Tokens, group: PrefixGroup, columns: Sequence[ActivationColumn]) -> _GroupRun:
        """Computes the shared prefix of a group, or takes it from the cache."""
        own = [tokens.ids[i][group.num_tokens :] for i in group.prompts]
        if not group.num_tokens or not isinstance(self.backbone, PackedBackbone):
            return _GroupRun(group, own, columns)
        shared = tuple(tokens.ids[group.prompts[0]][: group.num_tokens])
        deepest = max(column.layer for column in columns)
        cached = self.prefix_cache.longest(shared, deepest) if self.prefix_cache is not None else None
        if cached is not None and len(cached.ids) == len(shared):
            return _GroupRun(group, own, columns, cached)
        prefix, work = self._compute_prefix(self.backbone, shared, deepest, cached)
        if self.prefix_cache is not None:
            self.prefix_cache.add(prefix)
        return _GroupRun(group, own, columns, prefix, work)

    def _compute_prefix(
        self, backbone: PackedBackbone, ids: Ids, deepest: int, cached: Prefix | None
    ) -> tuple[Prefix, Work]:
        """Computes a prefix, starting from a shorter cached one if there is one."""
        first = len(cached.ids) if cached is not None else 0
        sums = PrefixSums(len(ids), self.spec.mean_over == "after_first", cached.sums if cached is not None else None)
        pack = Pack.of([ids[first:]], self.device, cached.keys_and_values if cached is not None else None)
        own: list[KeyValue] = []
        backbone.run(pack, sums.visit, deepest, keep=own)
        before = [cached.keys_and_values[:deepest]] if cached is not None else []
        # torch.cat copies: the tensors that `run` keeps are views of several times larger ones.
        layers = zip(*before, own, strict=True)
        joined = [(torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])) for parts in layers]
        return Prefix(ids, joined, sums), self._work([len(ids) - first], first, deepest)

    def _batches(self, group: _GroupRun) -> Iterator[NDArray[np.int64]]:
        lengths = [len(ids) for ids in group.own]
        if isinstance(self.backbone, PackedBackbone):
            return token_budget_batches(lengths, self.budget_tokens, is_padded=False)
        return token_budget_batches(lengths, self.budget_tokens, is_mixed=self.backbone.is_mixed)

    def _run_packs(self, run: Callable[[_GroupBatch], Work], packs: Sequence[_GroupBatch]) -> Iterator[Work]:
        """Runs the packs, on a CPU one per core: all cores on one pack would idle during its serial parts."""
        threads = torch.get_num_threads()
        if not self.runs_side_by_side or min(threads, len(packs)) < 2:
            return map(run, packs)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return iter(list(pool.map(run, packs)))
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _forward_pack(self, results: _Results, group_batch: _GroupBatch) -> Work:
        group, batch = group_batch
        prefix = group.prefix
        pack = Pack.of([group.own[i] for i in batch], self.device, prefix.keys_and_values if prefix else None)
        leave_out_first = self.spec.mean_over == "after_first"
        sums = prefix.sums if prefix else None
        pooler = Pooler(group.columns, pack.lengths, self.device, leave_out_first, sums, self.scales)
        deepest = max(column.layer for column in group.columns)
        self.backbone.run(pack, pooler.visit, deepest)
        results.put(np.array(group.prompts.prompts)[batch], pooler.result())
        return self._work(pack.lengths, group.prompts.num_tokens, deepest)

    def _work(self, lengths: list[int], prefix_tokens: int, num_blocks: int) -> Work:
        padded = 0 if isinstance(self.backbone, PackedBackbone) else max(lengths) * len(lengths) - sum(lengths)
        flops = self.cost.flops(lengths, prefix_tokens, num_blocks)
        return Work(computed_tokens=sum(lengths), padded_tokens=padded, flops=flops)


@dataclass(frozen=True)
class _GroupRun:
    """A group of prompts with its computed prefix, if it has one."""

    prompts: PrefixGroup
    own: list[list[int]]  # token ids of each prompt after the prefix
    columns: Sequence[ActivationColumn]
    prefix: Prefix | None = None
    work: Work = field(default_factory=Work)  # of computing the prefix


_GroupBatch = tuple[_GroupRun, NDArray[np.int64]]  # the indices in `own` of the prompts of one pack


class _Results:
    """Collects activations on the host. On CUDA, copies those of a pack while the device computes the next pack."""

    def __init__(self, columns: Sequence[ActivationColumn], num_prompts: int, hidden_size: int) -> None:
        self.columns = columns
        self.values_CND = np.empty((len(columns), num_prompts, hidden_size), np.float16)
        self._copying: tuple[NDArray[np.int64], Tensor, torch.cuda.Event] | None = None

    def put(self, prompts: NDArray[np.int64], pooled_CBD: Tensor) -> None:
        if not pooled_CBD.is_cuda:
            self.values_CND[:, prompts] = pooled_CBD.cpu().numpy()
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


def _budget_tokens(device_type: str) -> int:
    return BUDGET_TOKENS.get(device_type, BUDGET_TOKENS["cpu"])


def _packed(backbone: Any, hooked: HookedBackbone, expected: ExpectedStates) -> PackedBackbone | None:
    """Returns a PackedBackbone if it matches transformers; otherwise restores the model and returns None."""
    config, attention = text_config(backbone), backbone.config._attn_implementation
    if not is_length_independent(config):
        return None
    try:
        packed = PackedBackbone(backbone, hooked.blocks)
        is_exact = _is_exact(packed, expected)
        if is_exact and (packed.windows - {None} or not has_windows(config)):
            _fuse_if_exact(packed, expected)
            return packed
    except Exception as error:  # a model can raise any exception on packed inputs
        log.debug("%s cannot be packed: %s", type(backbone).__name__, error)
    backbone.set_attn_implementation(attention)
    return None


def _fuse_if_exact(packed: PackedBackbone, expected: ExpectedStates) -> None:
    """Replaces modules of the model by faster ones, unless it then differs from transformers."""
    restore, name = fuse(packed.blocks), type(packed.backbone).__name__
    try:
        if _is_exact(packed, expected):
            return
        log.debug("%s differs from transformers with fused modules", name)
    except Exception as error:  # a model may use more of a module than its result
        log.debug("%s does not run with fused modules: %s", name, error)
    restore()


def _is_exact(packed: PackedBackbone, expected: ExpectedStates) -> bool:
    checks = (expected.matches, expected.matches_in_batch, expected.matches_after_prefix)
    return all(check(packed.run) for check in checks)
