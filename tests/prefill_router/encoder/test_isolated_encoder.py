"""Prompts that the encoder cannot read are found, and a child process that dies is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from prefill_router.common.schema import ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.isolated_encoder import EncoderDied, IsolatedEncoder
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from tiny import save_tiny_model

COLUMNS = [ActivationColumn("last", 2), ActivationColumn("mean", 4)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    return EncoderSpec(model=str(save_tiny_model(tmp_path_factory.mktemp("tiny"), chat_template=None)), dtype="float32")


@pytest.fixture(scope="module")
def isolated(spec: EncoderSpec) -> Iterator[IsolatedEncoder]:
    encoder = IsolatedEncoder(spec, threads=1)
    yield encoder
    encoder.close()


def test_activations_are_those_of_the_encoder(isolated: IsolatedEncoder, spec: EncoderSpec) -> None:
    prompts = ["one two", "three", "four five six"]
    expected = PrefillEncoder.load(spec, device="cpu").read(prompts, COLUMNS)
    survivors, crashes = isolated.read_survivors(prompts, COLUMNS)
    assert crashes == {}
    for name, values in expected.encoded.items():
        np.testing.assert_allclose(survivors.encoded[name], values, rtol=2**-10, atol=2e-6)


def test_prompts_that_fail_are_left_out_with_the_reason(isolated: IsolatedEncoder) -> None:
    broken: list[dict[str, str]] = [{"role": "user"}]
    survivors, crashes = isolated.read_survivors(["one two", broken, "three", broken], COLUMNS)
    assert crashes == dict.fromkeys([1, 3], "the encoder raised KeyError: 'content'")
    assert survivors.encoded["num_tokens"].tolist() == [3, 2]


def test_a_killed_process_is_reported_and_started_again(isolated: IsolatedEncoder) -> None:
    isolated.read(["one"], COLUMNS)
    process = isolated._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EncoderDied, match=r"^the encoder ended its process: killed by SIGKILL$"):
        isolated.read(["one"], COLUMNS)
    assert len(isolated.read(["one"], COLUMNS).encoded["last_002"]) == 1
