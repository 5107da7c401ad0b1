"""The router artifact: encoder identity, projections, trunk, kernel machine, calibration, pool: JSON and safetensors.

A directory with `router.json`, which names the weights by their hash and is written last. Its version is a hash of all
its content. No pickle anywhere.
"""

# N prompts, T targets

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError

from prefill_router import storage
from prefill_router.common import validation
from prefill_router.common.errors import UserError, one_line
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.corpus.split import Split
from prefill_router.encoder import prefill_encoder
from prefill_router.encoder.prefill_encoder import EncoderIdentity, PrefillEncoder
from prefill_router.encoder.tokenization import Tokens
from prefill_router.policy.decision import Decision, Policy, Prediction, decide
from prefill_router.policy.pool import Pool
from prefill_router.predictor.answer_length import mean_tokens, quantile_tokens
from prefill_router.predictor.calibration import Calibration
from prefill_router.predictor.drift import TrainingDistance
from prefill_router.predictor.kernel_ridge import KernelMachine
from prefill_router.predictor.stacking import stacked
from prefill_router.predictor.trunk import SharedTrunkNet
from prefill_router.probe.projection import Projection

FORMAT = 1
MANIFEST = "router.json"
_REMEDY = "copy the router again, or train it again"


class Estimates(NamedTuple):
    """What a router's parts say of prompts, each (N, T)."""

    p_trunk: NDArray[np.float32]
    p_kernel: NDArray[np.float32]  # may leave [0, 1]
    log_lengths: NDArray[np.float32]  # of 1 + output tokens


class RouterManifest(validation.StrictModel):
    """router.json."""

    format: Literal[1]
    version: str
    encoder: EncoderIdentity
    pool: Pool
    columns: list[str]
    kernel_weight: float = Field(ge=0.0, le=1.0)
    default_tolerance: float = Field(ge=0.0, le=1.0)
    split: Split
    training: dict[str, Any]
    weights: str = Field(pattern=r"^[\w-]+\.safetensors$")
    weights_sha256: str


@dataclass(frozen=True)
class Router:
    """Routes prompts. Load one with `Router.load`; the encoder is loaded when the first prompt comes."""

    encoder_identity: EncoderIdentity
    pool: Pool
    projections: list[Projection]
    trunk: SharedTrunkNet
    kernel: KernelMachine  # of P(correct), then of log(1 + output tokens)
    kernel_weight: float  # of its P(correct) beside the trunk's, in [0, 1]
    length_spread: NDArray[np.float32]  # (T,) standard deviation of log(1 + output tokens)
    length_scale: NDArray[np.float32]  # (T,) mean lengths as a multiple of the medians, see `length.mean_scale`
    default_tolerance: float
    training_prompts: NDArray[np.uint64]  # sorted hashes of the prompts that training or validation saw
    # Sorted: the split groups of those prompts, of the kind in `split`.
    training_units: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    split: Split = field(default_factory=Split)  # whose test part nothing was learnt from
    training: dict[str, Any] = field(default_factory=dict)  # for people: on what it was trained, and how it went
    calibration: Calibration = None  # type: ignore[assignment]  # by default, none

    def __post_init__(self) -> None:
        if self.calibration is None:
            object.__setattr__(self, "calibration", Calibration.identity(len(self.pool.targets)))

    @property
    def columns(self) -> list[ActivationColumn]:
        """The activation columns that the router reads."""
        return [projection.column for projection in self.projections]

    @cached_property
    def encoder(self) -> PrefillEncoder:
        """Raises UserError where the encoder that can be loaded is not the one that the router was trained on."""
        encoder = PrefillEncoder.load(self.encoder_identity.spec)
        self.check_encoder(encoder.fingerprint, self.encoder_identity.spec.model)
        return encoder

    def require_encoder(self) -> None:
        """Raises UserError where the encoder cannot be loaded; none of its weights is read."""
        prefill_encoder.check(self.encoder_identity.spec)

    def check_encoder(self, fingerprint: str, source: str) -> None:
        if fingerprint != self.encoder_identity.fingerprint:
            raise UserError(
                f"{source}: encoder fingerprint {fingerprint} is not {self.encoder_identity.fingerprint}, on which the "
                "router was trained: use the same weights, tokenizer and settings, or train again"
            )

    def with_pool(self, pool: Pool) -> Router:
        """The same router for some of its targets, in another order, or at other prices.

        What it says of a target stays as it is. Raises UserError for a target that it does not know.
        """
        known = {name: t for t, name in enumerate(self.pool.target_names)}
        if unknown := [name for name in pool.target_names if name not in known]:
            raise UserError(f'target "{unknown[0]}" is not one of the router\'s: {", ".join(known)}')
        own = [known[name] for name in pool.target_names]
        training = dict(self.training)
        if pool.prices != self.pool.prices and "validation" in training:
            kept = {name: value for name, value in training["validation"].items() if name not in ("curve", "singles")}
            training["validation"] = kept  # what it was worth held at those prices
        return replace(
            self,
            pool=pool,
            training=training,
            trunk=self.trunk.of_outputs(own),
            kernel=self.kernel.of_outputs([*own, *(len(known) + t for t in own)]),
            length_spread=self.length_spread[own],
            length_scale=self.length_scale[own],
            calibration=self.calibration.of_targets(own),
        )

    # --- prediction ----------------------------------------------------------------------------------------------

    @cached_property
    def distance(self) -> TrainingDistance | None:
        """From the training prompts, in features; None where the router keeps none of them."""
        return TrainingDistance.of(self.kernel.landmarks)

    def features(self, activations: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Features (N, F) of activations by column name."""
        return np.concatenate([projection(activations[projection.column.name]) for projection in self.projections], 1)

    @torch.inference_mode()
    def estimates(self, features: NDArray[np.float32]) -> Estimates:
        """What trunk (the mean of its seeds) and kernel machine say of features (N, F)."""
        p_trunk = torch.sigmoid(self.trunk(torch.from_numpy(features))).mean(0).numpy()
        return Estimates(p_trunk, *np.split(self.kernel(features), 2, axis=1))

    def uncalibrated(self, estimates: Estimates) -> NDArray[np.float32]:
        """P(correct) (N, T) of trunk and kernel machine together."""
        return stacked(estimates.p_trunk, estimates.p_kernel, self.kernel_weight)

    def prediction(self, estimates: Estimates) -> Prediction:
        """What the router says, given what its parts do."""
        return Prediction(
            self.calibration(self.uncalibrated(estimates)), mean_tokens(estimates.log_lengths, self.length_scale)
        )

    def predict_features(self, features: NDArray[np.float32]) -> Prediction:
        """The prediction for features (N, F)."""
        return self.prediction(self.estimates(features))

    def predict_length(self, prompts: Sequence[Prompt], q: float) -> NDArray[np.float32]:
        """The output tokens (N, T) that an answer exceeds with probability 1 - q."""
        encoded, _ = self.encoder.forward(self.encoder.tokenize(prompts), self.columns)
        logs = self.estimates(self.features(encoded)).log_lengths
        return quantile_tokens(logs, self.length_spread, q)

    def predict_activations(self, activations: Mapping[str, NDArray[Any]]) -> Prediction:
        """The prediction for prompts whose activations are at hand, by column name."""
        return self.predict_features(self.features(activations))

    def predict(self, prompts: Sequence[Prompt]) -> Prediction:
        """P(correct) and the expected output tokens of every target, each (N, T) float32, in the pool's order."""
        encoded, _ = self.encoder.forward(self.encoder.tokenize(prompts), self.columns)
        return self.predict_activations(encoded)

    def route(
        self,
        prompt: Prompt,
        *,
        tolerance: float | None = None,
        allowed: Sequence[str] | None = None,
        max_cost: float | None = None,
        min_p: float | None = None,
    ) -> Decision:
        """The decision for one prompt, under the policy of the keywords (see `Policy`)."""
        policy = Policy(tolerance, allowed, max_cost, min_p)
        return self.decide(self.encoder.tokenize([prompt]), [policy])[0]

    def decide(self, tokens: Tokens, policies: Sequence[Policy]) -> list[Decision]:
        """The decision for each tokenised prompt, under its own policy.

        Costs count all tokens of a prompt, those too that the encoder cut. Raises UserError for a policy that
        `check_policy` refuses.
        """
        encoded, _ = self.encoder.forward(tokens, self.columns)
        prediction = self.predict_activations(encoded)
        return decide(self.pool, prediction, tokens, policies, self.default_tolerance, self.version)

    def check_policy(self, policy: Policy) -> NDArray[np.bool_]:
        """The targets that a policy allows, as a mask (T,). Raises UserError for one that is not in the pool."""
        return policy.mask(self.pool)

    # --- the artifact --------------------------------------------------------------------------------------------

    @cached_property
    def version(self) -> str:
        """A hash of all that is in the artifact."""
        return self._manifest_and_weights[0].version

    @cached_property
    def _manifest_and_weights(self) -> tuple[RouterManifest, bytes]:
        weights = safetensors.numpy.save(self._tensors())
        digest = hashlib.sha256(weights).hexdigest()
        content: dict[str, Any] = {
            "format": FORMAT,
            "encoder": self.encoder_identity.model_dump(),
            "pool": self.pool.model_dump(),
            "columns": [column.name for column in self.columns],
            "kernel_weight": self.kernel_weight,
            "default_tolerance": self.default_tolerance,
            "split": self.split.model_dump(),
            "training": self.training,
            "weights": f"weights-{digest[:16]}.safetensors",
            "weights_sha256": digest,
        }
        version = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return RouterManifest(version=version, **content), weights

    def save(self, uri: str) -> None:
        """Writes the artifact; a router that lay there stays whole until this one is."""
        manifest, weights = self._manifest_and_weights
        storage.write_bytes(storage.join(uri, manifest.weights), weights)
        storage.write_json(storage.join(uri, MANIFEST), manifest.model_dump())
        for path in storage.list_files(uri, [".safetensors"]):
            if storage.name(path) != manifest.weights:
                storage.remove(path)

    @classmethod
    def load(cls, uri: str) -> Router:
        """Raises UserError where there is no router, or it is damaged, or of a newer format."""
        path = storage.join(uri, MANIFEST)
        if not storage.exists(path):
            raise UserError(f"{uri}: no router lies here ({MANIFEST} is missing): run train first")
        data = storage.read_json(path)
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise UserError(f"{path}: format {data['format']} is newer than this release reads ({FORMAT}): upgrade")
        manifest = validation.validate(RouterManifest, data, path)
        weights_uri = storage.join(uri, manifest.weights)
        storage.require(weights_uri, "weights file, though router.json names it")
        weights = storage.read_bytes(weights_uri)
        if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
            raise UserError(f"{weights_uri}: its checksum is not the one in {MANIFEST}: the file is damaged: {_REMEDY}")
        try:
            router = cls._from_tensors(manifest, safetensors.numpy.load(weights))
            router._check_tensors()
        except (IndexError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
            raise UserError(f"{weights_uri}: does not fit {MANIFEST}: {one_line(error)}: {_REMEDY}") from None
        if router.version != manifest.version:
            raise UserError(
                f"{path}: version {manifest.version} does not match its content: the file was changed: {_REMEDY}"
            )
        return router

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {
            "training_prompts": self.training_prompts,
            "training_units": self.training_units,
        }
        for projection in self.projections:
            for name in ("mean", "std", "components"):
                tensors[f"projection.{projection.column.name}.{name}"] = getattr(projection, name)
        tensors |= {f"trunk.{name}": value.numpy() for name, value in self.trunk.state_dict().items()}
        tensors |= {f"kernel.{name}": value for name, value in self.kernel.tensors().items()}
        tensors |= {f"calibration.{name}": value for name, value in self.calibration.tensors().items()}
        return tensors | {"length_spread": self.length_spread, "length_scale": self.length_scale}

    def _check_tensors(self) -> None:
        """Raises ValueError for a tensor that does not fit the encoder, the pool or the others, or is not finite."""
        hidden_size, num_targets = self.encoder_identity.hidden_size, len(self.pool.targets)
        num_features = sum(projection.num_features for projection in self.projections)
        tensors = self._tensors()
        num_landmarks = len(self.kernel.landmarks)
        expected: dict[str, tuple[int, ...]] = {
            "kernel.landmarks": (num_landmarks, num_features),
            "kernel.coefficients": (num_landmarks, 2 * num_targets),
            "kernel.mean": (2 * num_targets,),
            "length_spread": (num_targets,),
            "length_scale": (num_targets,),
            "calibration.kinds": (num_targets,),
            "training_prompts": (self.training_prompts.size,),
            "training_units": (self.training_units.size,),
        }
        for projection in self.projections:
            prefix = f"projection.{projection.column.name}"
            expected |= {f"{prefix}.{name}": (hidden_size,) for name in ("mean", "std")}
            expected[f"{prefix}.components"] = (hidden_size, projection.num_features)
        weights = list(self.trunk.weights)
        sizes = [num_features, *(weight.shape[2] for weight in weights[:-1]), num_targets]
        for layer, (i, o) in enumerate(itertools.pairwise(sizes)):
            expected[f"trunk.weights.{layer}"] = (len(weights[0]), i, o)
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} has shape {tensors[name].shape}, must be {shape}")
        for name, values in tensors.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite")

    @classmethod
    def _from_tensors(cls, manifest: RouterManifest, tensors: Mapping[str, NDArray[Any]]) -> Router:
        projections = [
            Projection(
                ActivationColumn.parse(name),
                *(tensors[f"projection.{name}.{part}"] for part in ("mean", "std", "components")),
            )
            for name in manifest.columns
        ]
        return cls(
            encoder_identity=manifest.encoder,
            pool=manifest.pool,
            projections=projections,
            trunk=SharedTrunkNet.from_state({n: torch.from_numpy(t) for n, t in _part(tensors, "trunk").items()}),
            kernel=KernelMachine.from_tensors(_part(tensors, "kernel")),
            kernel_weight=manifest.kernel_weight,
            length_spread=tensors["length_spread"],
            length_scale=tensors["length_scale"],
            default_tolerance=manifest.default_tolerance,
            training_prompts=tensors["training_prompts"],
            training_units=tensors["training_units"],
            split=manifest.split,
            training=manifest.training,
            calibration=Calibration.from_tensors(_part(tensors, "calibration")),
        )


def _part(tensors: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    prefix = f"{name}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
