"""Sensors: the encoders that a router reads prompts with, causal LMs and sentence encoders alike."""

# N prompts

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from prefill_router.encoder.tokenization import Tokens

Encoder = TypeVar("Encoder", EncoderIdentity, EncoderSpec)
Sensor = PrefillEncoder | SentenceEncoder
SensorTokens = Mapping[str, Tokens]  # the same prompts, tokenised by each sensor


def load_sensor(spec: EncoderSpec) -> Sensor:
    """Loads an encoder of either kind. Raises UserError if it cannot be loaded."""
    return SentenceEncoder.load(spec.model) if checkpoint.is_sentence_model(spec.model) else PrefillEncoder.load(spec)


def named(encoders: Iterable[Encoder]) -> dict[str, Encoder]:
    """Names encoders for columns and folders: "" for a single one, otherwise its own name, numbered if it is taken."""
    several = list(encoders)
    if len(several) == 1:
        return {"": several[0]}
    names: dict[str, Encoder] = {}
    for encoder in several:
        numbered = (f"{encoder.name}-{number}" for number in itertools.count(2))
        free = (name for name in itertools.chain([encoder.name], numbered) if name not in names)
        names[next(free)] = encoder
    return names


def tokenize(sensors: Mapping[str, Sensor], prompts: Sequence[Prompt]) -> dict[str, Tokens]:
    """Tokenises prompts for each sensor."""
    return {name: sensor.tokenize(prompts) for name, sensor in sensors.items()}


def read(
    sensors: Mapping[str, Sensor], tokens: SensorTokens, columns: Collection[ActivationColumn]
) -> dict[str, NDArray[Any]]:
    """Runs each sensor in turn and returns the activations (N, D) of `columns` by name."""
    activations: dict[str, NDArray[Any]] = {}
    for name, sensor in sensors.items():
        own = [column for column in columns if column.encoder == name]
        if own:
            encoded, _ = sensor.forward(tokens[name], [column.unnamed for column in own])
            activations |= {column.name: encoded[column.unnamed.name] for column in own}
    return activations
