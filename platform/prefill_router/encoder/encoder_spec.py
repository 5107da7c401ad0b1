"""Descriptions of an encoder that need no weights: its configuration, identity, size, and a check that it will load."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from prefill_router.common.console import doing
from prefill_router.common.errors import UserError
from prefill_router.common.schema import POOLINGS, SENTENCE, ActivationColumn, MeanOver, Pooling, activation_columns
from prefill_router.common.validation import IsoDate, JsonObject, StrictModel
from prefill_router.encoder import checkpoint
from prefill_router.encoder.architecture import architecture, backbone_of, block_cost, find_blocks, text_config
from prefill_router.encoder.hardware import DType
from prefill_router.encoder.prefill_work import ModelCost
from prefill_router.encoder.tokenization import PromptTokenizer

# Part of the fingerprint. Increase it with every change that alters the activations of an unchanged encoder.
ENCODING_VERSION = 4

EncoderKind = Literal["causal", "sentence"]


class EncoderSpec(StrictModel):
    """The user's configuration of an encoder. Fields that are None are resolved on load."""

    model: str = Field(min_length=1, description="Hub id, directory, or package:NAME")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model")
    dtype: DType | None = Field(None, description="By default bfloat16 if the hardware computes it fast, or float32")
    max_tokens: int = Field(4096, ge=2, description="Longer prompts are cut in the middle")
    mean_over: MeanOver = Field("all", description="Tokens that the mean pooling averages")
    template_arguments: JsonObject = Field({}, description="Passed to the chat template")
    template_date: IsoDate = Field("2026-01-01", description="The date that chat templates see as today's")

    @property
    def name(self) -> str:
        """A short name, for columns and folders: the end of the hub id, path or package."""
        return re.sub(r"[^\w.-]", "-", re.split("[/:]", self.model.rstrip("/"))[-1])


class EncoderIdentity(StrictModel):
    """Describes a loaded encoder well enough to load it again. The fingerprint changes with its activations."""

    kind: EncoderKind = Field("causal", exclude_if="causal".__eq__)
    spec: EncoderSpec
    num_layers: int
    hidden_size: int
    fingerprint: str
    # Divisors of each layer's states: see `activation_scales`. Not written if empty, so that older artifacts keep their
    # version.
    scales: list[int] = Field([], exclude_if=operator.not_)

    @property
    def name(self) -> str:
        return self.spec.name

    def columns(self, layers: Literal["all"] | Sequence[int], pooling: Sequence[Pooling]) -> list[ActivationColumn]:
        """Returns the activation columns of `layers` (indices in `hidden_states`, 0 to num_layers) and `pooling`.

        A sentence encoder has one column, whatever is asked for.
        """
        if self.kind == "sentence":
            return [ActivationColumn(SENTENCE, self.num_layers)]
        indices = range(self.num_layers + 1) if layers == "all" else layers
        _check_layers(indices, self.num_layers, self.spec.model)
        for name in pooling:
            if name not in POOLINGS:
                raise UserError(f'pooling "{name}" is unknown: use {" or ".join(POOLINGS)}')
        columns = activation_columns(indices, pooling)
        if not columns:
            raise UserError("no layers or no poolings were given: choose at least one of each")
        return columns


@dataclass(frozen=True)
class EncoderSize:
    """The size of an encoder, from its config."""

    num_layers: int
    hidden_size: int
    block: ModelCost
    kind: EncoderKind = "causal"

    @classmethod
    def of(cls, model: str) -> EncoderSize:
        """Reads the config of a hub id, a directory or `package:NAME`. Raises UserError if it cannot be an encoder."""
        is_sentence = checkpoint.is_sentence_model(model)
        backbone = _empty(partial(checkpoint.empty_sentence_model, model)) if is_sentence else _empty_backbone(model)
        config = text_config(backbone)
        blocks = find_blocks(backbone)
        kind: EncoderKind = "sentence" if is_sentence else "causal"
        return cls(len(blocks), config.hidden_size, block_cost(blocks[0], config), kind)


def _empty_backbone(model: str) -> Any:
    config = checkpoint.check_causal_lm(model)  # which unpacks a GGUF, and so needs a real device
    return backbone_of(_empty(partial(checkpoint.text_class(config).from_config, config)))


def _empty(build: Callable[[], Any]) -> Any:
    """Builds a model without memory for its weights."""
    with torch.device("meta"):
        return build()


@doing("checking the encoder")
def check_encoder(spec: EncoderSpec, layers: Sequence[int] = ()) -> None:
    """Raises UserError if the encoder cannot be loaded or lacks one of `layers`. Reads no weights."""
    if checkpoint.is_sentence_model(spec.model):
        checkpoint.check_sentence_model(spec.model)
        return
    config = checkpoint.check_causal_lm(spec.model, spec.revision)
    _check_layers(layers, config.get_text_config().num_hidden_layers, spec.model)


def check_same(identity: EncoderIdentity, fingerprint: str, source: str) -> None:
    """Raises UserError if the encoder of `source` differs from the one that a router was trained with."""
    if fingerprint != identity.fingerprint:
        raise UserError(
            f"{source}: encoder fingerprint {fingerprint} is not {identity.fingerprint}, which the router was trained "
            "with: use the same weights, tokenizer and settings, or train again"
        )


def _check_layers(layers: Iterable[int], num_layers: int, model: str) -> None:
    for layer in layers:
        if not 0 <= layer <= num_layers:
            raise UserError(f"layer {layer} is out of range: {model} has layers 0 to {num_layers}")


def fingerprint(spec: EncoderSpec, weights_id: str, config: Any, tokenizer: PromptTokenizer, scales: list[int]) -> str:
    """Returns a hash of everything that changes activations, except the device."""
    parts = {
        "encoding_version": ENCODING_VERSION,
        "weights": weights_id,
        "config": architecture(config),
        **tokenizer.digest,
        "dtype": spec.dtype,
        "max_tokens": spec.max_tokens,
        "mean_over": spec.mean_over,
        **({"scales": scales} if scales else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
