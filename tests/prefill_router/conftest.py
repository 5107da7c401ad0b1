"""What tests of the core share: a router built by hand around the tiny model, and a root to store things under."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from prefill_router.common.schema import ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.policy.pool import Pool, Target
from prefill_router.predictor.kernel_ridge import KernelMachine
from prefill_router.predictor.trunk import SharedTrunkNet
from prefill_router.probe.moments import Moments
from prefill_router.probe.projection import fit_projection
from prefill_router.router.artifact import Router
from tiny import random_prompts

COLUMNS = [ActivationColumn("last", 2), ActivationColumn("mean", 3)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """All tests of the core run so."""


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder as a URI, on every kind of storage."""
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def tiny_encoder(tiny_model: Path) -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec(model=str(tiny_model), dtype="float32"), device="cpu")


def random_net(sizes: list[int], num_seeds: int) -> SharedTrunkNet:
    net = SharedTrunkNet(sizes, num_seeds)
    net.reset(range(num_seeds))
    return net.requires_grad_(False)


def build_router(encoder: PrefillEncoder) -> Router:
    """A router of random weights over two columns and two targets."""
    activations = encoder.encode(random_prompts(60, seed=3), [2, 3])
    projections = [fit_projection(column, Moments.of(activations[column.name])) for column in COLUMNS]
    num_features = sum(p.num_features for p in projections)
    rng = np.random.default_rng(4)
    kernel = KernelMachine(
        landmarks=rng.normal(size=(7, num_features)).astype(np.float16),
        lengthscale=float(num_features) ** 0.5,
        coefficients=rng.normal(size=(7, 4)).astype(np.float32),
        mean=np.array([0.6, 0.4, 4.0, 3.0], np.float32),
    )
    return Router(
        encoders={"": encoder.identity},
        pool=Pool(
            name="pool",
            targets=(
                Target(name="big", input_price=2.0, output_price=8.0),
                Target(name="small", input_price=0.1, output_price=0.4),
            ),
        ),
        projections=projections,
        trunk=random_net([num_features, 8, 2], num_seeds=3),
        kernel=kernel,
        kernel_weight=0.25,
        length_spread=np.array([0.5, 0.3], np.float32),
        length_scale=np.array([1.25, 1.0], np.float32),
        default_tolerance=0.05,
        training_prompts=np.array([3, 5, 8], np.uint64),
        training={"recipe": "random", "metrics": {"validation_losses": [0.5, 0.25]}},
    )


@pytest.fixture(scope="session")
def tiny_router(tiny_encoder: PrefillEncoder) -> Router:
    return build_router(tiny_encoder)
