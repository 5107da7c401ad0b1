"""Memory is flat in the corpus's size: ten times the prompts take at most 1.2 times the memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chaos.job import ExtractJob
from corpora import write_corpus
from tiny import random_prompts


def peak_bytes(num_prompts: int, tiny_model: Path, folder: Path) -> int:
    prompts = [f"{prompt} {i}" for i, prompt in enumerate(random_prompts(num_prompts))]
    corpus = write_corpus(folder / f"{num_prompts}.jsonl", prompts)
    job = ExtractJob(folder / "log", corpus=corpus, encoder=tiny_model, workers=1, out=folder / str(num_prompts))
    peak = 0
    while job.process.poll() is None:
        peak = max(peak, job.pss_bytes())
        time.sleep(1)
    job.wait(60)
    return peak


@pytest.mark.slow("11,000 prompts, and two Rays whose memory is measured")
def test_peak_memory_is_flat(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_FORKS")  # forks share memory that processes of users do not
    small, large = (peak_bytes(n, tiny_model, tmp_path) for n in (1_000, 10_000))
    assert large <= 1.2 * small, f"{large / 2**20:,.0f} MiB against {small / 2**20:,.0f} MiB"
