"""The router: encoder identity, projections, trunk, kernel machine, calibration and pool, saved as one artifact."""

# N prompts, T targets

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from prefill_router.common.errors import UserError
from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.corpus.split import Split
from prefill_router.encoder import sensors
from prefill_router.encoder.encoder_spec import EncoderIdentity, check_encoder, check_same
from prefill_router.encoder.sensors import Sensor, SensorTokens, load_sensor
from prefill_router.policy.decision import Decision, Policy, Prediction, decide
from prefill_router.policy.pool import Pool
from prefill_router.predictor.answer_length import mean_tokens, quantile_tokens
from prefill_router.predictor.calibration import Calibration
from prefill_router.predictor.drift import TrainingDistance
from prefill_router.predictor.kernel_ridge import KernelMachine
from prefill_router.predictor.stacking import stacked
from prefill_router.predictor.stand_in import StandIn
from prefill_router.predictor.trunk import SharedTrunkNet
from prefill_router.probe.projection import Projection
from prefill_router.router.artifact_folder import FORMAT, ArtifactKind, ArtifactManifest

MANIFEST = "router.json"
FORMAT_OF_ONE = 1  # the format of routers with a single unnamed encoder, which older releases read too


class Estimates(NamedTuple):
    """Outputs of a router's models for N prompts, each (N, T)."""

    p_trunk: NDArray[np.float32]
    p_kernel: NDArray[np.float32]  # may be outside [0, 1]
    log_lengths: NDArray[np.float32]  # of 1 + output tokens


class RouterManifest(ArtifactManifest):
    """The content of router.json."""

    # Of a router with a single one; otherwise by the names in `columns`. Older releases refuse a key that they lack.
    encoder: EncoderIdentity | None = Field(None, exclude_if=operator.not_)
    encoders: dict[str, EncoderIdentity] = Field({}, exclude_if=operator.not_)
    pool: Pool
    columns: list[str]
    kernel_weight: float = Field(ge=0.0, le=1.0)
    default_tolerance: float = Field(ge=0.0, le=1.0)
    split: Split
    training: dict[str, Any]


_KIND = ArtifactKind(
    name="router",
    manifest_file=MANIFEST,
    manifest_type=RouterManifest,
    if_missing="run train first",
    if_damaged="copy the router again, or train it again",
)


@dataclass(frozen=True)
class Router:
    """Routes prompts. Load one with `Router.load`; its encoder is loaded with the first prompt."""

    encoders: dict[str, EncoderIdentity]  # by the names in the columns; the first counts a prompt's input tokens
    pool: Pool
    projections: list[Projection]
    trunk: SharedTrunkNet
    kernel: KernelMachine  # outputs P(correct) (T,), then log(1 + output tokens) (T,)
    kernel_weight: float  # weight of the kernel's P(correct), in [0, 1]; the rest is the trunk's
    length_spread: NDArray[np.float32]  # (T,) standard deviation of log(1 + output tokens)
    length_scale: NDArray[np.float32]  # (T,) mean lengths as multiples of medians, see `answer_length.mean_scale`
    default_tolerance: float
    training_prompts: NDArray[np.uint64]  # sorted hashes of the prompts used in training or validation
    # Sorted hashes of the split groups of those prompts, as `split` defines groups.
    training_units: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    split: Split = field(default_factory=Split)  # its held-out part was not used in training
    training: dict[str, Any] = field(default_factory=dict)  # information for users: data and results of training
    calibration: Calibration = None  # type: ignore[assignment]  # identity by default

    def __post_init__(self) -> None:
        if self.calibration is None:
            object.__setattr__(self, "calibration", Calibration.identity(len(self.pool.targets)))

    @property
    def format(self) -> int:
        """The artifact format that it is written in."""
        return FORMAT_OF_ONE if list(self.encoders) == [""] else FORMAT

    @property
    def columns(self) -> list[ActivationColumn]:
        """The activation columns that the router uses."""
        return [projection.column for projection in self.projections]

    @property
    def correct_at(self) -> float | None:
        """The reward from which an answer counted as right in training; None if rewards counted as they are."""
        return self.training.get("correct_at")

    @cached_property
    def sensors(self) -> dict[str, Sensor]:
        """The router's encoders by name. Raises UserError if one cannot be loaded, or differs from that of training."""
        return {name: self.load_sensor(name) for name in self.encoders}

    def load_sensor(self, name: str) -> Sensor:
        """Loads one encoder. Raises UserError if the model at its location is not the one used in training."""
        identity = self.encoders[name]
        sensor = load_sensor(identity.spec)
        check_same(identity, sensor.fingerprint, identity.spec.model)
        return sensor

    def require_encoders(self) -> None:
        """Raises UserError if an encoder cannot be loaded. Reads none of their weights."""
        for identity in self.encoders.values():
            check_encoder(identity.spec)

    def with_pool(self, pool: Pool) -> Router:
        """Returns this router for a subset of its targets, in any order and at any prices.

        Predictions for a target stay the same. Raises UserError for an unknown target.
        """
        known = {name: t for t, name in enumerate(self.pool.target_names)}
        if unknown := [name for name in pool.target_names if name not in known]:
            raise UserError(f'target "{unknown[0]}" is unknown to the router: use only {", ".join(known)}')
        own = [known[name] for name in pool.target_names]
        training = dict(self.training)
        if pool.prices != self.pool.prices and "validation" in training:
            kept = {name: value for name, value in training["validation"].items() if name not in ("curve", "singles")}
            training["validation"] = kept  # curve and singles depend on prices
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

    @property
    def distance(self) -> TrainingDistance | None:
        """Distance from the training prompts; None if the router has too few landmarks."""
        return self.distance_of(self.encoders)

    def distance_of(self, encoders: Collection[str]) -> TrainingDistance | None:
        """Distance from the training prompts by the features of `encoders`; None as for `distance`."""
        key = frozenset(encoders)
        if key not in self._distances:
            is_read = self._is_of(key)
            columns = slice(None) if is_read.all() else np.flatnonzero(is_read)
            self._distances[key] = TrainingDistance.of(self.kernel.landmarks, columns)
        return self._distances[key]

    @cached_property
    def _distances(self) -> dict[frozenset[str], TrainingDistance | None]:
        return {}

    def features(self, activations: Mapping[str, NDArray[Any]], missing: Collection[str] = ()) -> NDArray[np.float32]:
        """Projects activations, given by column name, to features (N, F).

        For the encoders in `missing`, of which there are no activations, features are those of `without`.
        """
        num_prompts = len(next(iter(activations.values())))
        features = np.empty((num_prompts, sum(projection.num_features for projection in self.projections)), np.float32)
        for projection, place in zip(self.projections, self._places, strict=True):
            if projection.column.encoder not in missing:
                features[:, place] = projection(activations[projection.column.name])
        return self.without(features, missing) if missing else features

    def without(self, features: NDArray[np.float32], missing: Collection[str]) -> NDArray[np.float32]:
        """Replaces the features of some encoders by what those of the others predict: see `StandIn`."""
        is_missing, key = self._is_of(missing), frozenset(missing)
        if key not in self._stand_ins:
            landmarks = self.kernel.landmarks
            self._stand_ins[key] = StandIn.fit(landmarks[:, ~is_missing], landmarks[:, is_missing])
        filled = features.copy()
        filled[:, is_missing] = self._stand_ins[key](features[:, ~is_missing])
        return filled

    def _is_of(self, encoders: Collection[str]) -> NDArray[np.bool_]:
        """Whether each feature (F,) is of one of these encoders."""
        return np.repeat(
            [p.column.encoder in encoders for p in self.projections], [p.num_features for p in self.projections]
        )

    @cached_property
    def _places(self) -> list[slice]:
        """Where each projection's features are."""
        ends = np.cumsum([projection.num_features for projection in self.projections]).tolist()
        return [slice(end - p.num_features, end) for end, p in zip(ends, self.projections, strict=True)]

    @cached_property
    def _stand_ins(self) -> dict[frozenset[str], StandIn]:
        return {}

    @torch.inference_mode()
    def estimates(self, features: NDArray[np.float32]) -> Estimates:
        """Evaluates the trunk (mean over seeds) and the kernel machine on features (N, F)."""
        p_trunk = torch.sigmoid(self.trunk(torch.from_numpy(features))).mean(0).numpy()
        return Estimates(p_trunk, *np.split(self.kernel(features), 2, axis=1))

    def uncalibrated(self, estimates: Estimates) -> NDArray[np.float32]:
        """Combines trunk and kernel machine to P(correct) (N, T), before calibration."""
        return stacked(estimates.p_trunk, estimates.p_kernel, self.kernel_weight)

    def prediction(self, estimates: Estimates) -> Prediction:
        """Returns the router's prediction from its models' outputs."""
        return Prediction(
            self.calibration(self.uncalibrated(estimates)), mean_tokens(estimates.log_lengths, self.length_scale)
        )

    def predict_features(self, features: NDArray[np.float32]) -> Prediction:
        """Predicts from features (N, F)."""
        return self.prediction(self.estimates(features))

    def predict_length(self, prompts: Sequence[Prompt], q: float) -> NDArray[np.float32]:
        """Returns the output tokens (N, T) that an answer exceeds with probability 1 - q."""
        logs = self.estimates(self.features(self.read(self.tokenize(prompts)))).log_lengths
        return quantile_tokens(logs, self.length_spread, q)

    def predict_activations(self, activations: Mapping[str, NDArray[Any]]) -> Prediction:
        """Predicts from stored activations, given by column name."""
        return self.predict_features(self.features(activations))

    def predict(self, prompts: Sequence[Prompt]) -> Prediction:
        """Predicts P(correct) and expected output tokens, each (N, T) float32, with targets in the pool's order."""
        return self.predict_activations(self.read(self.tokenize(prompts)))

    def tokenize(self, prompts: Sequence[Prompt]) -> SensorTokens:
        """Tokenises prompts for each encoder."""
        return sensors.tokenize(self.sensors, prompts)

    def read(self, tokens: SensorTokens) -> dict[str, NDArray[Any]]:
        """Runs the encoders, and returns the activations of the router's columns by name."""
        return sensors.read(self.sensors, tokens, self.columns)

    def route(
        self,
        prompt: Prompt,
        *,
        tolerance: float | None = None,
        allowed: Sequence[str] | None = None,
        max_cost: float | None = None,
        min_p: float | None = None,
    ) -> Decision:
        """Decides one prompt; the keywords are those of `Policy`."""
        policy = Policy(tolerance, allowed, max_cost, min_p)
        return self.decide(self.tokenize([prompt]), [policy])[0]

    def decide(self, tokens: SensorTokens, policies: Sequence[Policy]) -> list[Decision]:
        """Decides each tokenised prompt under its own policy, as `policy.decision.decide` does."""
        prediction, counted = self.predict_activations(self.read(tokens)), tokens[next(iter(self.encoders))]
        return decide(self.pool, prediction, counted, policies, self.default_tolerance, self.version)

    # --- the artifact --------------------------------------------------------------------------------------------

    @cached_property
    def version(self) -> str:
        """A hash of the whole artifact."""
        return self._manifest_and_weights[0].version

    @cached_property
    def _manifest_and_weights(self) -> tuple[RouterManifest, bytes]:
        by_name = {name: identity.model_dump() for name, identity in self.encoders.items()}
        content = {
            "format": self.format,
            **({"encoder": by_name[""]} if self.format == FORMAT_OF_ONE else {"encoders": by_name}),
            "pool": self.pool.model_dump(),
            "columns": [column.name for column in self.columns],
            "kernel_weight": self.kernel_weight,
            "default_tolerance": self.default_tolerance,
            "split": self.split.model_dump(),
            "training": self.training,
        }
        return _KIND.pack(content, self._tensors())

    def save(self, uri: str) -> None:
        """Writes the artifact. An older router at `uri` stays complete until this one is."""
        _KIND.write(uri, *self._manifest_and_weights)

    @classmethod
    def load(cls, uri: str) -> Router:
        """Reads an artifact. Raises UserError if it is missing, damaged or of a newer format."""
        return _KIND.read(uri, cls._from_tensors)

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
        """Raises ValueError for a tensor that is not finite, or whose shape contradicts the encoder, pool or others."""
        num_targets = len(self.pool.targets)
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
            hidden_size = self.encoders[projection.column.encoder].hidden_size
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
        router = cls(
            encoders=manifest.encoders if manifest.encoder is None else {"": manifest.encoder},
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
        router._check_tensors()
        return router


def _part(tensors: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    prefix = f"{name}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
