"""What an encoder actor measures, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefill_jobs.extract import encoder_actor
from prefill_jobs.extract.encoder_actor import EncoderActor
from prefill_jobs.extract.shard_attempts import ShardAttempts
from prefill_jobs.runtime import shared_objects
from prefill_jobs.runtime.worker_notes import WorkerNote
from prefill_router.encoder.prefill_encoder import PrefillEncoder

pytestmark = pytest.mark.usefixtures("in_process")


class LoadedActor(EncoderActor):
    def __init__(self, loaded: PrefillEncoder) -> None:
        super().__init__(1, shared_objects.Shared(ShardAttempts), WorkerNote())
        self.loaded = loaded

    @property
    def sensors(self) -> dict[str, PrefillEncoder]:
        return {"": self.loaded}


def test_the_peak_is_that_of_all_gpus_of_the_encoder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PrefillEncoder.load(str(tiny_model), device="cpu")
    peaks = {torch.device("cuda", 0): 3.0, torch.device("cuda", 1): 4.0}
    monkeypatch.setattr(encoder_actor, "measured_peak_flops", lambda device, _dtype: peaks[device])
    monkeypatch.setattr(encoder, "devices", list(peaks))
    assert LoadedActor(encoder).peak_flops == 7.0
