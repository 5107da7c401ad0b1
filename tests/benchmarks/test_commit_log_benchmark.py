"""The benchmark's steps run one after another, and say what they promise."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # as when it is run as a script
    module = importlib.import_module("commit_log")
    monkeypatch.setattr(module, "_PENDING", 10)
    monkeypatch.setattr("prefill_router.activations.commit_log.SEGMENT_RECORDS", 16)
    return module


def test_the_steps_of_a_run(benchmark: Any, tmp_path: Path) -> None:
    uri, size = str(tmp_path / "all"), (60, 4)
    gathered = benchmark.gather(uri, *size)
    assert (gathered["objects"], gathered["keys_bytes"]) == (8, 50 * 4 * 24)
    assert benchmark.resume(uri, *size)["resume_s"] > 0
    assert benchmark.finish(uri, *size)["manifest_bytes"] > 60 * 64
    assert benchmark.read(uri, *size)["read_manifest_s"] > 0


def test_requests_are_counted(benchmark: Any, tmp_path: Path) -> None:
    requests = benchmark.on_s3(str(tmp_path / "s3"), 20, 4)["requests"]
    # Two claimed segments of two objects each beside the records; one request deletes all of these.
    assert (requests["put_object"], requests["delete_objects"]) == (24, 1)
