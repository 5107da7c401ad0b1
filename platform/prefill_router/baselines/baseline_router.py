"""A baseline that can be saved and served as a router, with its pool, sentence encoder and tolerance.

Its artifact has the format of `router.artifact_folder`, with the manifest `baseline.json`.
"""

# N prompts, T targets, F features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prefill_router.baselines import BASELINES
from prefill_router.baselines.base import Baseline
from prefill_router.common.errors import UserError
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import checkpoint
from prefill_router.encoder.sensors import Sensor
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from prefill_router.encoder.tokenization import Tokens
from prefill_router.policy.decision import Decision, Policy, Prediction, decide
from prefill_router.policy.pool import Pool
from prefill_router.router.artifact_folder import ArtifactKind, ArtifactManifest

MANIFEST = "baseline.json"


class BaselineManifest(ArtifactManifest):
    """The content of baseline.json."""

    baseline: str
    settings: dict[str, Any]
    pool: Pool
    sentence_encoder: str = Field(min_length=1)
    fingerprint: str
    default_tolerance: float = Field(ge=0.0, le=1.0)


_KIND = ArtifactKind(
    name="baseline",
    manifest_file=MANIFEST,
    manifest_type=BaselineManifest,
    if_missing="run evaluate first",
    if_damaged="copy the baseline again, or evaluate again",
)


@dataclass(frozen=True)
class BaselineRouter:
    """Routes prompts as `Router` does. Prompt lengths are counted in the sentence encoder's tokens."""

    name: str  # key in BASELINES
    baseline: Baseline
    pool: Pool
    output_tokens: NDArray[np.float32]  # (T,) expected answer lengths: each target's median in training
    default_tolerance: float
    sentence_encoder: str
    fingerprint: str

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder. Raises UserError if it is not the one that the baseline was fitted with."""
        encoder = SentenceEncoder.load(self.sentence_encoder)
        if encoder.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.sentence_encoder}: the sentence encoder differs from the one that the baseline was fitted with "
                f"(fingerprint {encoder.fingerprint}, expected {self.fingerprint}): restore it, or evaluate again"
            )
        return encoder

    @property
    def sensors(self) -> dict[str, Sensor]:
        """The sentence encoder, as a router's encoders are given."""
        return {"": self.encoder}

    def load_sensor(self, name: str) -> Sensor:
        """The sentence encoder, as a router loads one of its encoders."""
        return self.sensors[name]

    def require_encoders(self) -> None:
        """Raises UserError if the sentence encoder is missing, without reading it."""
        checkpoint.check_sentence_model(self.sentence_encoder)

    def with_pool(self, pool: Pool) -> BaselineRouter:
        """The same router with the prices of `pool`. Raises UserError if the targets are not the fitted ones."""
        prices = {target.name: target for target in pool.targets}
        if set(prices) != set(self.pool.target_names):
            raise UserError(
                f'pool "{pool.name}": its targets must be those that the baseline was fitted with: '
                f"{', '.join(self.pool.target_names)}"
            )
        targets = tuple(prices[name] for name in self.pool.target_names)
        return replace(self, pool=pool.model_copy(update={"targets": targets}))

    def predict(self, prompts: Sequence[Prompt]) -> Prediction:
        """P(correct) and expected output tokens, each (N, T) float32, with targets in the pool's order."""
        return self.predict_tokens(self.encoder.tokenize(prompts))

    def route(self, prompt: Prompt, policy: Policy | None = None) -> Decision:
        return self.decide(self.encoder.tokenize([prompt]), [policy or Policy()])[0]

    def decide(self, tokens: Tokens, policies: Sequence[Policy]) -> list[Decision]:
        """The decision for each tokenised prompt under its own policy."""
        prediction = self.predict_tokens(tokens)
        return decide(self.pool, prediction, tokens, policies, self.default_tolerance, self.version)

    def predict_tokens(self, tokens: Tokens) -> Prediction:
        """The prediction for prompts tokenised by `encoder`."""
        reads = type(self.baseline).reads
        x = self.encoder.embed_tokens(tokens) if reads == "embedding" else tokens.full_lengths[:, None]
        p_correct = self.baseline.predict_proba(x).astype(np.float32)
        return Prediction(p_correct, np.broadcast_to(self.output_tokens, p_correct.shape))

    # --- the artifact --------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return self._manifest_and_weights[0].version

    @cached_property
    def _manifest_and_weights(self) -> tuple[BaselineManifest, bytes]:
        content = {
            "baseline": self.name,
            "settings": self.baseline.settings(),
            "pool": self.pool.model_dump(),
            "sentence_encoder": self.sentence_encoder,
            "fingerprint": self.fingerprint,
            "default_tolerance": self.default_tolerance,
        }
        return _KIND.pack(content, {**self.baseline.tensors(), "output_tokens": self.output_tokens})

    def save(self, uri: str) -> None:
        """Writes the artifact. An older baseline at `uri` stays complete until this one is."""
        _KIND.write(uri, *self._manifest_and_weights)

    @classmethod
    def load(cls, uri: str) -> BaselineRouter:
        """Reads an artifact. Raises UserError if it is missing, damaged or of a newer format."""
        return _KIND.read(uri, cls._from_tensors)

    @classmethod
    def _from_tensors(cls, manifest: BaselineManifest, tensors: dict[str, NDArray[Any]]) -> BaselineRouter:
        if manifest.baseline not in BASELINES:
            raise ValueError(f'baseline "{manifest.baseline}" is unknown: it must be one of {", ".join(BASELINES)}')
        output_tokens = tensors.pop("output_tokens")
        return cls(
            name=manifest.baseline,
            baseline=BASELINES[manifest.baseline].restored(manifest.settings, tensors),
            pool=manifest.pool,
            output_tokens=output_tokens,
            default_tolerance=manifest.default_tolerance,
            sentence_encoder=manifest.sentence_encoder,
            fingerprint=manifest.fingerprint,
        )
